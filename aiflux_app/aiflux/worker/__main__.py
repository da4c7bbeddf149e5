"""``python -m aiflux.worker``: the image's runscript."""

import sys


def main() -> int:
    """Handle signals first: importing the worker takes a while."""
    # The imports are inside, because Ctrl-C works as soon as Python runs.
    try:
        from aiflux.errors import StoppedError, describe  # noqa: PLC0415
        from aiflux.worker.stop import Stopper  # noqa: PLC0415

        stopper = Stopper()
        stopper.install()
    except KeyboardInterrupt:
        sys.stderr.write("stopped (signal SIGINT) before the start\n")
        return 5  # ExitCode.STOPPED
    try:
        from aiflux.util.process_limits import exhaustion_stops  # noqa: PLC0415

        with exhaustion_stops():
            from aiflux.worker.main import main as run  # noqa: PLC0415
    except StoppedError as error:
        sys.stderr.write(describe(error) + "\n")
        return int(error.exit_code)
    return run(stopper=stopper)


if __name__ == "__main__":
    sys.exit(main())
