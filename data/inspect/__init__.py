"""Describes datasets, and the samples and augmentations that a job takes."""
