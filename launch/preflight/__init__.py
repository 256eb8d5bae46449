"""Checks, before a job starts, whether its nodes can run it."""
