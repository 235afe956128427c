"""Parts of the Fisher spectrum: blocks, samples, per-sample gradients, stores, Gram, records.

Shapes used throughout: ``N`` samples (labelled tokens or sequences), ``P`` parameters of a block,
``c`` samples of a chunk, ``S`` positions of a sequence. ``J`` is ``[N, P]``, one sample's gradient
a row, and the Fisher matrix of the block is ``F = (1/N) J^T J`` (``docs/math.md``, section 8).
"""
