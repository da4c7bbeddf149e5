"""The state of a run, from its files and from Slurm."""
