"""The run directory: identity, status, provenance, atomic files, locks, signals."""
