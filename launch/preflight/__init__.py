"""Checks before a start of a job whether its nodes can run it."""
