"""``aiflux examples``: a small project to start from."""

from __future__ import annotations

from importlib.resources import files

from aiflux.cli.parser import FOLDER, argument, command
from aiflux.errors import ConfigError
from aiflux.util.files import atomic_write, expanded, short, storage_error

NAMES = ("README.md", "prompts.jsonl", "aiflux.yaml", "answers.py")


@command("examples", examples=["aiflux examples first-project"])
@argument(
    "folder",
    required=False,
    default="aiflux-examples",
    metavar="[DIR]",
    type=FOLDER,
    help="Directory to write to (default: aiflux-examples)",
)
def examples(folder: str) -> int:
    """Write a small starter project: prompts, settings, a script and a README.

    Existing files are not overwritten.
    """
    directory = expanded(folder).absolute()
    existing = [name for name in NAMES if (directory / name).exists()]
    if existing:
        raise ConfigError(
            f"{', '.join(existing)} in {str(directory)!r} would be overwritten; nothing was "
            "written",
            "name another directory: aiflux examples DIR",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, directory) from error
    for name in NAMES:
        with atomic_write(directory / name) as file:
            file.write((files("aiflux.cli") / "starter" / name).read_bytes())
        print(f"wrote {short(directory / name)}")
    print(f"start with {short(directory / 'README.md')}")
    return 0
