#!/bin/bash
#SBATCH --job-name=aiflux
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@80

# The module of docs/installation.md; the site may name another.
type -P aiflux >/dev/null || module load aiflux

# With --local, this job itself is the worker's. exec lets Slurm's signals reach it.
exec aiflux run prompts.jsonl --output results.json --local --model "${MODEL_NAME:-llama3.2:3b}"
