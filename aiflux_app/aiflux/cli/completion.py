"""Shell completion: names of runs and models, and model names with colons in bash."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    shell_complete,
)

from aiflux.errors import AifluxError

SHELLS = ("bash", "zsh", "fish")


class _BashComplete(BashComplete):
    """Bash splits ``llama3.2:3b`` into three words; this joins them."""

    _ahead = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words, and the incomplete one."""
        args, incomplete = super().get_completion_args()
        line = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        if ":" not in line:
            return args, incomplete
        words: list[str] = []
        for at, word in enumerate(line):
            if words and (word == ":" or line[at - 1] == ":"):
                words[-1] += word
            else:
                words.append(word)
        whole = words[-1]
        self._ahead = whole[: whole.rfind(":") + 1]
        return words[1:-1], whole

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Return a line for the script, without the text before the last colon."""
        return f"{item.type},{item.value.removeprefix(self._ahead)}"


def script(shell: str, program: click.Command, variable: str) -> str:
    """Return the script with which a shell completes the program's command lines.

    Args:
        variable: the environment variable with which the script asks for completions.
    """
    complete = get_completion_class(shell)
    assert complete is not None  # noqa: S101 - the choices of the command
    return complete(program, {}, "aiflux", variable).source()


def answer(program: click.Command, variable: str) -> int:
    """Answer a shell that asks for completion."""
    add_completion_class(_BashComplete)
    return shell_complete(program, {}, "aiflux", variable, os.environ[variable])


def model_names() -> list[str]:
    """Return the models of the models directory and of the catalog."""
    from aiflux.core.config.config import Config
    from aiflux.engines.ollama.store import listed_models
    from aiflux.models.name import HUB_PREFIX

    # A configuration with an error is reported when a command runs.
    with suppress(AifluxError, OSError):
        config = Config()
        stored = [name.served for name in listed_models(config.models_dir)]
        catalog = config.catalog()
        return sorted({*stored, *catalog.models, *(HUB_PREFIX + repo for repo in catalog.hub)})
    return []


def run_names() -> dict[str, str]:
    """Return the names of the user's runs: outputs and job ids, each with a description."""
    from aiflux.core.runs.directory import user_output
    from aiflux.core.runs.registry import entries

    names = {}
    with suppress(AifluxError, OSError, RuntimeError):
        for entry in entries(os.environ):
            output = _short(user_output(entry.output))
            # Shells insert a name unquoted; names that need quotes are completed as files.
            if shlex.quote(output) == output or output.startswith("~/"):
                names[output] = f"run of {entry.submitted[:10]}"
            names.update(dict.fromkeys(entry.jobs, output))
    return names


def _short(path: Path) -> str:
    from aiflux.util.files import short

    return short(path)
