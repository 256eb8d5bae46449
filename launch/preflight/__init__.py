"""Whether nodes can do a job, looked at before it starts."""
