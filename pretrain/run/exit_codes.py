"""Defines the exit codes of a job's processes. Imports nothing, so that wrong settings are reported before torch is imported."""

EXIT_CONFIG = 2  # settings or data are wrong: restarting cannot help
EXIT_UNFIT = 3  # preflight rejected a node
EXIT_REQUEUE = 85  # saved after a stop request: the same command resumes the run
EXIT_STOP_FILE = 86  # saved because of RUN/STOP: do not start again
EXIT_HUNG = 87  # a step exceeded its time limit
