"""Describes a run to others: the files in its directory, its records, its state and the exit codes of its processes."""
