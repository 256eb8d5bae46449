"""Shows and measures: what is in a dataset, what a job takes of it, and how fast."""
