"""A simulated cluster: hosts, processes, clocks, a file server and SLURM, under one seed."""
