"""The life of a sweep: its cells, what is to be done, who does it, and how it stands.

    plan -> submission (frozen cells) -> queue -> executor (serial, local, SLURM) -> worker
    -> run directory

``directory`` says where things lie, ``plan`` which cells there are and how they stand, ``cell``
what a process is given, and ``worker`` runs one cell under its lock. ``run`` is the course of one
multirun: its ``queue`` gives cells to an executor (``serial``, ``local`` or ``slurm``), and a
``worker_process`` is watched there; ``tally`` counts how they end. ``status`` and ``commands`` are
what ``fisher-lab status`` and ``cancel`` do. Nothing here imports torch; a worker does when its
task needs it.
"""
