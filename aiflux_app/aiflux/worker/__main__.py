"""``python -m aiflux.worker``: the image's runscript."""

import sys

from aiflux.errors import StoppedError, describe
from aiflux.util.process_limits import exhaustion_stops
from aiflux.worker.stop import Stopper


def main() -> int:
    """Install signal handlers first: importing the worker takes a while."""
    stopper = Stopper()
    stopper.install()
    try:
        with exhaustion_stops():
            from aiflux.worker.main import main as run  # noqa: PLC0415 - after the handlers
    except StoppedError as error:
        sys.stderr.write(describe(error) + "\n")
        return int(error.exit_code)
    return run(stopper=stopper)


if __name__ == "__main__":
    sys.exit(main())
