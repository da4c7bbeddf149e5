"""``aiflux``, and ``python -m aiflux.cli``: signals are handled before anything else is loaded."""

import os
import sys


def main() -> int:
    """Run one command; return the exit code."""
    # The imports are inside, because Ctrl-C works as soon as Python runs.
    try:
        from aiflux.util.signals import unwinding

        with unwinding():
            from aiflux.cli.main import main as run

            code = run()
    except KeyboardInterrupt as signal:
        code = 5  # ExitCode.STOPPED
        if not os.environ.get("_AIFLUX_COMPLETE"):  # else the shell completes
            print(f"stopped by {str(signal) or 'Ctrl-C'} before the end", file=sys.stderr)
    # Ctrl-C in generated code, as dataclasses run it, makes Python end by SIGINT although `main`
    # returned an exit code (CPython, run_eval_code_obj). The next such code resets that.
    exec("")  # noqa: S102 - empty
    return code


if __name__ == "__main__":
    sys.exit(main())
