"""What a process's exit code says; apart from what needs torch, so that a mistake in the settings is told at once."""

EXIT_CONFIG = 2  # settings or data that can't work: starting again will not help
EXIT_AGAIN = 85  # stopped on request and saved: start me again
