"""The run directory: identity, provenance, atomic files, claims."""
