"""The command line: the only place that prints, and where an error becomes an exit code."""

from aiflux.cli.main import main

__all__ = ["main"]
