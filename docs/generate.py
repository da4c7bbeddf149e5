"""Write what the documentation says about settings from the table of settings itself.

``python docs/generate.py`` brings ``docs/configuration.md`` (between its markers) and
``.env.example`` up to date; ``tests/unit/test_docs.py`` checks that they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from aiflux.core.arguments import add_settings
from aiflux.core.settings import SETTINGS, Setting

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"
ENV_EXAMPLE = ROOT / ".env.example"
BEGIN = "<!-- made by docs/generate.py: begin -->\n"
END = "<!-- made by docs/generate.py: end -->\n"
SECTIONS = {
    "run": "how requests are processed",
    "slurm": "what is asked of Slurm",
    "paths": "where things lie",
}
_HEADER = """\
# Settings for .env: copy this file to .env in the folder where you call aiflux.
# Made by docs/generate.py. An empty value means: not set. What is in the environment wins.
"""


def settings_tables() -> str:
    """Return one Markdown table for each section."""
    return "\n".join(
        "\n".join([f"### `{section}`: {title}", "", *_table(section), ""])
        for section, title in SECTIONS.items()
    )


def env_example() -> str:
    """Return the text of ``.env.example``: every setting that has an environment name."""
    parts = [_HEADER]
    for section, title in SECTIONS.items():
        parts.append(f"\n# --- {title} ---\n")
        parts += [
            f"\n# {_meaning(setting)}{_default_note(setting)}\n{setting.env}=\n"
            for setting in SETTINGS
            if setting.section == section and setting.env
        ]
    return "".join(parts)


def with_tables(text: str) -> str:
    """Return the text of ``docs/configuration.md`` with the tables between its markers renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + settings_tables() + "\n" + END + after


def _table(section: str) -> Iterator[str]:
    yield "| key | option | environment | default | meaning |"
    yield "|---|---|---|---|---|"
    options = _options()
    for setting in SETTINGS:
        if setting.section == section:
            names = [setting.option, *("--" + alias.replace("_", "-") for alias in setting.aliases)]
            cells = [
                f"`{setting.name}`",
                ", ".join(f"`{name}`" for name in names if name in options),
                f"`{setting.env}`" if setting.env else "",
                _default(setting),
                _meaning(setting),
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


def _meaning(setting: Setting) -> str:
    # argparse reads %% as a percent sign.
    return setting.help.replace("%%", "%")


def main() -> None:
    """Write both files."""
    CONFIGURATION.write_text(
        with_tables(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8"
    )
    ENV_EXAMPLE.write_text(env_example(), encoding="utf-8")


if __name__ == "__main__":
    main()
