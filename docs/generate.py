"""Write what the documentation says about settings and commands from the code itself.

``python docs/generate.py`` brings ``docs/configuration.md`` and ``docs/structure.md`` (between
their markers), ``docs/reference.md`` and ``.env.example`` up to date; ``tests/unit/test_docs.py``
checks that they are.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

from aiflux.cli.main import GROUPS, make_parser
from aiflux.cli.parser import Parser, is_setting
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SECTIONS, SETTINGS, TITLES

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"
STRUCTURE = ROOT / "docs" / "structure.md"
PACKAGE = ROOT / "aiflux_app" / "aiflux"
REFERENCE = ROOT / "docs" / "reference.md"
ENV_EXAMPLE = ROOT / ".env.example"
BEGIN = "<!-- made by docs/generate.py: begin -->\n"
END = "<!-- made by docs/generate.py: end -->\n"
_HEADER = """\
# Settings for .env: copy this file to .env in the folder where you call aiflux.
# Made by docs/generate.py. An empty value means: not set. What is in the environment wins.
"""
_HAS_ALL = "aiflux run"
_TYPED = ("aiflux ", "source ")
_REFERENCE_HEADER = """\
# Every command

Made from the code by `docs/generate.py`. In a terminal: `aiflux run --help`, and
`aiflux run --help-all` for what is rarely needed. `R` names a run: its output, its run directory or
a Slurm job id. [Settings](configuration.md) can stand in `aiflux.yaml` or the environment too; exit
codes are [here](output.md#exit-codes).

"""


def settings_tables() -> str:
    """Return one Markdown table for each section."""
    return "\n".join(
        "\n".join([f"### `{section}`: {title}", "", *_table(section), ""])
        for section, title in TITLES.items()
    )


def env_example() -> str:
    """Return the text of ``.env.example``: every setting that has an environment name."""
    parts = [_HEADER]
    for section, title in TITLES.items():
        parts.append(f"\n# --- {title} ---\n")
        parts += [
            f"\n# {setting.help}{_default_note(setting)}\n{setting.env}=\n"
            for setting in SETTINGS
            if setting.section == section and setting.env and setting.offered
        ]
    return "".join(parts)


def with_tables(text: str) -> str:
    """Return the text of ``docs/configuration.md`` with the tables between its markers renewed."""
    return _between_markers(text, settings_tables())


def with_modules(text: str) -> str:
    """Return the text of ``docs/structure.md`` with the modules between its markers renewed."""
    return _between_markers(text, "\n".join(map(_modules, _packages())))


def _between_markers(text: str, made: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + made + "\n" + END + after


def _packages() -> list[str]:
    """Return the packages below ``aiflux`` that hold modules."""
    folders = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    return [
        folder.relative_to(PACKAGE).as_posix()
        for folder in folders
        if folder != PACKAGE and len([*folder.glob("*.py")]) > 1
    ]


def _modules(part: str) -> str:
    """Return a table of the modules of a part of the package, in their own words."""
    rows = [f"### `{part}`", "", _first_line(PACKAGE / part / "__init__.py"), ""]
    rows += ["| module | purpose |", "|---|---|"]
    for path in sorted((PACKAGE / part).glob("*.py")):
        if not path.stem.startswith("__"):
            words = _first_line(path).replace("``", "`").replace("|", "\\|")
            rows.append(f"| [{path.stem}](../{path.relative_to(ROOT)}) | {words} |")
    return "\n".join(rows) + "\n"


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def reference() -> str:
    """Return the text of ``docs/reference.md``: every command with its options and an example."""
    parser = make_parser()
    commands = {command.prog.split()[-1]: (command, text) for command, text in parser.commands()}
    parts = [_REFERENCE_HEADER]
    for title, names in GROUPS.items():
        links = ", ".join(f"[{name}](#aiflux-{name})" for name in names)
        parts.append(f"- {title}: {links}\n")
    for names in GROUPS.values():
        for name in names:
            parts += _command(*commands[name], "##")
    return "".join(parts)


def _command(command: Parser, text: str, level: str) -> Iterator[str]:
    """Yield the section of a command, and those of the commands below it."""
    below = command.commands()
    yield f"\n{level} {command.prog}\n\n{command.description or text}\n"
    if not below:
        usage = " ".join(command.format_usage().removeprefix("usage: ").split())
        yield f"\n```\n{usage}\n```\n\n| option | meaning |\n|---|---|\n"
        yield from map(_row, _shown(command))
        yield _settings_of(command)
        yield f"\n{_example(command)}"
    for action, words in below:
        yield from _command(action, words, level + "#")


def _shown(command: Parser) -> Iterator[argparse.Action]:
    """Yield the options that are worth a line here: not --help, nor settings of other commands."""
    for action in command._actions:
        helps = {"--help", "--help-all"} & {*action.option_strings}
        if not helps and (command.prog == _HAS_ALL or not is_setting(action)):
            yield action


def _settings_of(command: Parser) -> str:
    """Return a line about the settings that a command has as options without a line for each."""
    given = {action.dest for action in command._actions if is_setting(action)}
    sections = [
        name
        for name in SECTIONS
        if all(setting.name in given for setting in SETTINGS if setting.section == name)
    ]
    if command.prog == _HAS_ALL or not sections:
        return ""
    names = ", ".join(f"`{name}`" for name in sections)
    return f"\nAnd the [settings](configuration.md) under {names}.\n"


def _row(action: argparse.Action) -> str:
    value = action.metavar or "" if action.nargs != 0 else ""
    if action.choices is not None and not action.metavar:
        value = "{" + ",".join(str(choice) for choice in action.choices) + "}"
    names = [f"`{name} {value}`".replace(" `", "`") for name in action.option_strings]
    text = (action.help or "") % {"default": action.default, "prog": ""}
    cells = [", ".join(names) or f"`{value or action.dest}`", text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _example(command: Parser) -> str:
    """Return the examples of a command's help as a block, and what else stands beside them."""
    lines = [line.strip() for line in (command.epilog or "").splitlines()]
    shell = [line.partition("example: ")[2] or line for line in lines]
    examples = [line for line in shell if line.startswith(("aiflux ", "source "))]
    rest = [
        line for line in lines if line and not line.startswith(("aiflux ", "source ", "example"))
    ]
    told = "\n".join(["```sh", *examples, "```"]) + "\n"
    return told + ("\n" + "\n".join(rest) + "\n" if rest else "")


def _table(section: str) -> Iterator[str]:
    yield "| key | option | environment | default | meaning |"
    yield "|---|---|---|---|---|"
    options = _options()
    for setting in SETTINGS:
        if setting.section == section and setting.offered:
            cells = [
                f"`{setting.name}`",
                ", ".join(f"`{name}`" for name in setting.options if name in options),
                f"`{setting.env}`" if setting.env else "",
                _default(setting),
                setting.help,
            ]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _options() -> set[str]:
    parser = argparse.ArgumentParser()
    add_settings(parser, *SECTIONS)
    return set(parser.format_help().replace(",", " ").replace("[", " ").split())


def _default(setting: Setting) -> str:
    if setting.default in (None, {}, ()):
        return ""
    if isinstance(setting.default, bool):
        return f"`{str(setting.default).lower()}`"
    return f"`{setting.default}`"


def _default_note(setting: Setting) -> str:
    default = _default(setting).strip("`")
    return f" (default: {default})" if default else ""


def main() -> None:
    """Write the files."""
    STRUCTURE.write_text(with_modules(STRUCTURE.read_text(encoding="utf-8")), encoding="utf-8")
    REFERENCE.write_text(reference(), encoding="utf-8")
    CONFIGURATION.write_text(
        with_tables(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8"
    )
    ENV_EXAMPLE.write_text(env_example(), encoding="utf-8")


if __name__ == "__main__":
    main()
