"""Several ranks of one run: starting them, on one node or several, and their process group."""
