"""The life of a sweep: its cells, what is to be done, who does it, and how it stands.

    plan -> submission (frozen cells) -> queue -> executor (local, SLURM) -> worker -> run directory

``directory`` says where things lie and what has happened, ``plan`` which cells there are, ``cell``
how one stands and what its process is given, and ``worker`` runs it under its lock. ``run`` is the
course of one multirun: its ``queue`` gives cells to an executor (``local`` or ``slurm``), and a
``worker_process`` is watched there. ``status`` is ``fisher-lab status`` and ``cancel``. Nothing
here imports torch; a worker does when its task needs it.
"""
