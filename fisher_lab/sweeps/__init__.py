"""The life of a sweep: its cells, what is to be done, who does it, and how it stands.

    plan -> submission (frozen cells) -> launcher (serial, local, SLURM) -> worker -> run directory

`layout` says where things lie, `plan` which cells there are and how they stand, `frozen` what a job
is given, `worker` runs one cell under its claim, `supervisor` watches over one worker process,
`serial`, `pool`, `slurm` and `debug_cluster` are the launchers (`waiting` has what those that run
some cells at a time have yet to start), `session` the course of one multirun and `commands` what
``fisher-lab status`` and ``cancel`` do. Nothing here imports torch; a worker does when its task
needs it.
"""
