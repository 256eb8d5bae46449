"""Starts the processes of a job: Slurm scripts, the job supervisor, preflight checks, and the tasks of a step."""
