"""What a process's exit code says; apart from what needs torch, so that a mistake in the settings is told at once."""

EXIT_CONFIG = 2  # settings or data that can't work: starting again will not help
EXIT_UNFIT = 3  # preflight: a node is not fit for the job
EXIT_AGAIN = 85  # stopped on request and saved: start me again
EXIT_ENDED = 86  # stopped by RUN/STOP and saved: don't
EXIT_HUNG = 87  # no step finished in time
