"""``python -m aiflux.worker``: the image's runscript."""

import sys

from aiflux.worker.stop import Stopper


def main() -> int:
    """Listen to signals first: the imports of the worker take a while."""
    stopper = Stopper()
    stopper.install()
    from aiflux.worker.main import main as run  # noqa: PLC0415 - after the handlers

    return run(stopper=stopper)


if __name__ == "__main__":
    sys.exit(main())
