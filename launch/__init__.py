"""From a cluster to processes: Slurm scripts, and one task of a job."""
