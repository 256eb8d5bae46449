"""A run as others see it: the files in its directory, its records, its state and the exit codes of its processes."""
