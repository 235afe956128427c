"""Plugins that let Hydra find the sweeps of fisher_lab and validate their cells."""
