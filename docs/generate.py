"""Write what the documentation says about settings and commands from the code itself.

``python docs/generate.py`` brings ``docs/configuration.md``, ``docs/engines.md``,
``docs/output.md`` and ``docs/structure.md`` (between their markers), ``docs/reference.md`` and
``.env.example`` up to date; ``tests/unit/test_docs.py`` checks that they are.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from aiflux.cli.main import GROUPS, make_program
from aiflux.cli.parser import Command, Option, setting_help
from aiflux.core.config.declaration import Setting
from aiflux.core.config.engine_command import PLACEHOLDERS
from aiflux.core.config.settings import BY_NAME, SECTIONS, SETTINGS, TITLES
from aiflux.models.endpoints import ENDPOINTS

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"
ENGINES = ROOT / "docs" / "engines.md"
OUTPUT = ROOT / "docs" / "output.md"
STRUCTURE = ROOT / "docs" / "structure.md"
PACKAGE = ROOT / "aiflux_app" / "aiflux"
REFERENCE = ROOT / "docs" / "reference.md"
ENV_EXAMPLE = ROOT / ".env.example"
BEGIN = "<!-- made by docs/generate.py: begin -->\n"
END = "<!-- made by docs/generate.py: end -->\n"
_HEADER = """\
# Settings for .env: copy this file to .env in the directory where you run aiflux.
# Made by docs/generate.py. An empty value means "not set". The environment takes precedence.
"""
_LINK = "[settings](configuration.md)"
_HAS_ALL = "aiflux run"
_LISTED_UNDER = {"accounting": "aiflux report"}
_REFERENCE_HEADER = """\
# Every command

Made from the code by `docs/generate.py`. In a terminal, `aiflux help run` or `aiflux run --help`
shows the common options and `aiflux run --help-all` all of them. `RUN` is a run's output file, its
run directory or a Slurm job id. [Settings](configuration.md) can also be in `aiflux.yaml` or the
environment. See also the [exit codes](output.md#exit-codes).

Every command has `-h` and `--help`, and `-v` (`--verbose`, `--debug`), which shows the traceback of
an error. `aiflux --version` or `-V` shows the version.

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


def with_endpoints(text: str) -> str:
    """Return the text of ``docs/output.md`` with the table between its markers renewed."""
    engines = [*dict.fromkeys(name for each in ENDPOINTS.values() for name in each.engines)]
    shown = " | ".join(f"`{name}`" for name in engines)
    rows = [
        f"| `url` | the body has | {shown} | [column `answer`](converters.md#answers-to-tables) |",
        "|---" * (len(engines) + 3) + "|",
    ]
    for each in ENDPOINTS.values():
        payloads = ", or ".join(
            " and ".join(f"`{name}`" for name in sorted(fields)) for fields in each.payloads
        )
        has = " | ".join(_support(each.engines.get(name)) for name in engines)
        rows.append(f"| `{each.url}` | {payloads} | {has} | {each.result} |")
    return _between_markers(text, "\n".join(rows))


def _support(version: str | None) -> str:
    return "no" if version is None else f"from {version}" if version else "yes"


def with_placeholders(text: str) -> str:
    """Return the text of ``docs/engines.md`` with the table between its markers renewed."""
    rows = [f"| `{{{name}}}` | {meaning} |" for name, meaning in PLACEHOLDERS.items()]
    return _between_markers(text, "\n".join(["| placeholder | stands for |", "|---|---|", *rows]))


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
    program = make_program()
    root = click.Context(program, info_name="aiflux", **program.context_settings)
    parts = [_REFERENCE_HEADER]
    for title, names in GROUPS.items():
        links = ", ".join(f"[{name}](#aiflux-{name})" for name in names)
        parts.append(f"- {title}: {links}\n")
    for name in program.list_commands(root):
        _, command, _ = program.resolve_command(root, [name])
        parts += _command(click.Context(command, info_name=name, parent=root), "##")
    return "".join(parts)


def _command(ctx: click.Context, level: str) -> Iterator[str]:
    """Yield the section of a command, and those of its subcommands."""
    command = ctx.command
    yield f"\n{level} {ctx.command_path}\n\n{inspect.cleandoc(command.help or '')}\n"
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _command(click.Context(below, info_name=name, parent=ctx), level + "#")
    if not isinstance(command, Command):
        return
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield f"\n```\n{usage}\n```\n\n"
    rows = [_row(param, ctx) for param in _shown(command, ctx)]
    if rows:
        yield "".join(["| option | meaning |\n|---|---|\n", *rows])
        yield _settings_of(command, ctx)
        yield "\n"
    yield "\n".join(["```sh", *command.examples, "```"]) + "\n"
    if command.note:
        yield f"\n{command.note}\n"


def _shown(command: Command, ctx: click.Context) -> Iterator[click.Parameter]:
    """Yield the parameters that get a line here.

    Settings are listed under one command only, unless another one has its own text for them.
    """
    for param in command.params:
        hidden = isinstance(param, click.Option) and param.hidden
        if not hidden and (not _is_setting(param) or _is_listed(param, ctx)):
            yield param


def _is_listed(param: click.Parameter, ctx: click.Context) -> bool:
    """Return whether a setting has its line under this command."""
    setting = BY_NAME[str(param.name)]
    usual = getattr(param, "help", None) == setting_help(setting)
    return not usual or ctx.command_path == _LISTED_UNDER.get(setting.section, _HAS_ALL)


def _is_setting(param: click.Parameter) -> bool:
    return isinstance(param, Option) and param.panel in TITLES.values() and param.name in BY_NAME


def _settings_of(command: Command, ctx: click.Context) -> str:
    """Return lines about the settings that a command has as options without a line for each."""
    given = [
        BY_NAME[str(param.name)]
        for param in command.params
        if _is_setting(param) and not _is_listed(param, ctx)
    ]
    own = {param.name for param in command.params}
    lines, whole = [], []
    for section in SECTIONS:
        here = [setting for setting in given if setting.section == section]
        missing = [
            each
            for each in SETTINGS
            if each.section == section and each.offered and each.name not in own
        ]
        if len(missing) > len(here) > 0:
            lines.append(f"And of the {_LINK} under `{section}`: {_options(here)}.")
        elif here:
            less = f" (without {_options(missing)})" if missing else ""
            whole.append(f"`{section}`{less}")
    if whole:
        lines.append(f"And the {_LINK} under {', '.join(whole)}.")
    return "".join(f"\n{line}\n" for line in lines)


def _options(settings: list[Setting]) -> str:
    return ", ".join(f"`{setting.option}`" for setting in settings if setting.offered)


def _row(param: click.Parameter, ctx: click.Context) -> str:
    value = param.make_metavar(ctx)
    if isinstance(param, click.Argument):
        names = [f"`{value.strip('[].')}`"]
    else:
        is_flag = isinstance(param, click.Option) and param.is_flag
        options = sorted((*param.opts, *param.secondary_opts), key=len)
        names = [f"`{name}`" if is_flag else f"`{name} {value}`" for name in options]
    cells = [", ".join(names), str(getattr(param, "help", ""))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _table(section: str) -> Iterator[str]:
    yield "| key | option | environment | default | meaning |"
    yield "|---|---|---|---|---|"
    for setting in SETTINGS:
        if setting.section == section and setting.offered:
            cells = [
                f"`{setting.name}`",
                ", ".join(f"`{name}`" for name in setting.options),
                f"`{setting.env}`" if setting.env else "",
                _default(setting),
                setting.help,
            ]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
    OUTPUT.write_text(with_endpoints(OUTPUT.read_text(encoding="utf-8")), encoding="utf-8")
    ENGINES.write_text(with_placeholders(ENGINES.read_text(encoding="utf-8")), encoding="utf-8")
    ENV_EXAMPLE.write_text(env_example(), encoding="utf-8")


if __name__ == "__main__":
    main()
