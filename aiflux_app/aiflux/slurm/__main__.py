"""``python -m aiflux.slurm``: print the generic batch script, ``slurm/run.sbatch``."""

import sys

from aiflux.slurm.script import generic_script

if __name__ == "__main__":
    sys.stdout.write(generic_script())
