"""K-FAC: the engine and its parts."""
