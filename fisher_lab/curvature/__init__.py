"""The mathematics: Kronecker factors, Fisher spectra, Lanczos, group Fisher.

Imports torch, numpy and scipy and nothing of the rest of the package: no configuration, no
files, no printing. Every formula cites a section of ``docs/math.md``.
"""
