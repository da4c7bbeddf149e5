"""AI-Flux: run an open language model over a file of prompts on a Slurm cluster."""

__version__ = "0.1.0"
