"""``python -m aiflux.cli``."""

import sys

from aiflux.cli import main

if __name__ == "__main__":
    code = main()
    # Ctrl-C in generated code, as dataclasses run it, makes Python end by SIGINT although `main`
    # returned an exit code (CPython, run_eval_code_obj). The next such code resets that.
    exec("")  # noqa: S102 - empty
    sys.exit(code)
