"""Exit codes of a job's processes. Imports nothing, so that wrong settings are reported before torch is imported."""

EXIT_CONFIG = 2  # settings or data are wrong: starting again cannot help
EXIT_UNFIT = 3  # preflight rejected a node
EXIT_AGAIN = 85  # stopped on request and saved: start again
EXIT_ENDED = 86  # stopped by RUN/STOP and saved: do not start again
EXIT_HUNG = 87  # a step exceeded its time limit
