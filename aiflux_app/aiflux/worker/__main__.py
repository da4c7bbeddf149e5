"""``python -m aiflux.worker``: the image's runscript."""

import sys

from aiflux.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
