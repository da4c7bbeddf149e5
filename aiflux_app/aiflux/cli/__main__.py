"""``python -m aiflux.cli``."""

import sys

from aiflux.cli import main

if __name__ == "__main__":
    sys.exit(main())
