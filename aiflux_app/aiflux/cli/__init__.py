"""The command line: the only place that prints, and where an error becomes an exit code."""


def __getattr__(name: str) -> object:
    # Programs that earlier versions of pyproject.toml installed start here.
    if name == "main":
        from aiflux.cli.__main__ import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
