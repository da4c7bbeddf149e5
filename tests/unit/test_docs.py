"""The documentation matches the code: links, commands, make targets, settings, examples."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from aiflux.converters.chain.steps_file import read_chain
from aiflux.core.batch.request import parse_request
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SETTINGS
from aiflux.core.config.sources import read_dotenv
from aiflux.errors import ExitCode
from aiflux.models.catalog import read_catalog
from aiflux.slurm.limits import site_limits
from aiflux.worker.main import make_parser as make_worker_parser
from tests.unit.command_line import PROGRAM, leaves, option_names, parse

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"--[a-z][a-z0-9-]+")
# Options of sbatch, Apptainer, ruff and mypy that the pages mention.
FOREIGN_OPTIONS = {
    "--dependency",  # sbatch
    "--test-only",
    "--mount",  # Apptainer
    "--secret",
    "--net",
    "--network",
    "--containall",
    "--nv",
    "--rocm",
    "--bind",
    "--requeue",
    "--strict",
    "--push",
    "--export-secret-keys",
    "--backend-sampling",  # of llama-server
    "--kv-unified",
    "--max-num-seqs",  # of vLLM
    "--uds",
    "--host",
}
# Every option of LLMFlux 2.0.0 (its cli.py): docs/moving.md describes each.
LLMFLUX_OPTIONS = OPTION.findall("""
    --model --input --output --batch-size --save-frequency --max-retries --retry-delay --max-tokens
    --temperature --top-p --top-k --account --partition --nodes --gpus-per-node --time --mem
    --cpus-per-task --engine --sbatch-arg --rebuild --debug --vllm-engine-args --custom-config-path
    --local-port --wait-timeout --email --name --num-prompts --all --state --tail --follow
    --stdout-only --stderr-only --force --version
""")
MOVING = ROOT / "docs" / "moving.md"

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for _, language, text in FENCE.findall(read(page)) if language in languages]


def spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", read(page)))


def shell_lines(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        yield from block.replace("\\\n", " ").splitlines()


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def piped(given: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a pipe, without a final redirection."""
    if ">" in given:
        given = given[: given.index(">")]
    while "|" in given:
        yield given[: given.index("|")]
        given = given[given.index("|") + 1 :]
    yield given


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@per_page
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        assert aim.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(aim), f"{page} links to {target}"


@per_page
def test_commands_parse(page: Path) -> None:
    for line in shell_lines(page):
        for given in piped(words(line)):
            if given[:1] == ["aiflux"] and given[1:] not in ([], ["--version"]):
                parse(given[1:])


@per_page
def test_worker_options_parse(page: Path) -> None:
    for line in shell_lines(page):
        given = words(line)
        starts = [
            at
            for at, word in enumerate(given)
            if (given[:2] == ["apptainer", "run"] and word == "aiflux.sif")
            or (given[:1] == ["sbatch"] and word == "slurm/run.sbatch")
        ]
        for start in starts:
            if given[start + 1 :] != ["--help"]:
                make_worker_parser().parse_args(given[start + 1 :])


@per_page
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        given = words(span)[1:] if span.startswith("aiflux ") else []
        commands = [word for word in given if re.fullmatch(r"[a-z][a-z-]*", word)]
        if given and commands:
            command = named(commands)
            assert command is not None, f"{page}: {span}"
            known = option_names(command) | COMMON
            assert set(OPTION.findall(span)) <= known, f"{page}: {span}"


# What every command has.
COMMON = {"--help", "--help-all", "--verbose", "--debug"}


def named(words: list[str]) -> click.Command | None:
    """Return a command; what follows the command is an argument of it."""
    ctx = click.Context(PROGRAM)
    for depth, word in enumerate(words):
        if not isinstance(ctx.command, click.Group):
            break
        below = ctx.command.get_command(ctx, word)
        if below is None:
            return None if depth == 0 else ctx.command
        ctx = click.Context(below, parent=ctx)
    return ctx.command


@per_page
def test_options_in_the_text_exist(page: Path) -> None:
    known = known_options() | FOREIGN_OPTIONS | set(LLMFLUX_OPTIONS if page == MOVING else ())
    for span in spans(page):
        for option in OPTION.findall(span):
            assert option in known, f"{page}: {span}"


def test_every_llmflux_option_is_described() -> None:
    described = set(OPTION.findall(read(MOVING)))
    assert set(LLMFLUX_OPTIONS) - {"--follow", "--version"} <= described


def known_options() -> set[str]:
    """Return the options of every command and of the worker."""
    own = {"--version", *COMMON}
    return aiflux_options() | own | set(make_worker_parser()._option_string_actions)


def aiflux_options() -> set[str]:
    """Return the options of every command."""
    return {name for ctx in leaves() for name in option_names(ctx.command)} - {"--nodes"}


@per_page
def test_make_targets_exist(page: Path) -> None:
    rules = re.findall(r"^([a-z][\w./-]*):", read(ROOT / "Makefile"), re.MULTILINE)
    for text in [*shell_lines(page), *spans(page)]:
        for target in re.findall(r"(?:^|[;&=1] )make ([a-z][\w./-]*)", text):
            assert target in rules, f"{page}: {text}"


def test_commands_are_found_in_the_pages() -> None:
    """The tests above would also pass if no commands were found."""
    lines = [words(line) for line in shell_lines(ROOT / "README.md")]
    assert ["make", "image"] in lines
    assert any(line[:2] == ["aiflux", "run"] for line in lines)
    by_sbatch = "sbatch slurm/run.sbatch input.jsonl --model llama3.2:3b"
    assert by_sbatch.split() in lines
    by_hand = "apptainer run aiflux.sif input.jsonl output.json --model smollm2:135m"
    assert by_hand.split() in lines


def test_the_settings_tables_are_up_to_date() -> None:
    made = generator()
    text = read(made.CONFIGURATION)
    assert text == made.with_tables(text), "run: python docs/generate.py"
    for setting in SETTINGS:
        assert (f"| `{setting.name}` |" in text) == setting.offered
    assert "for requests without one (not with Ollama)" in text, "llama.cpp and vLLM obey top_k"


def test_the_reference_is_up_to_date() -> None:
    made = generator()
    text = read(made.REFERENCE)
    assert text == made.reference(), "run: python docs/generate.py"
    assert all(f"`{option}" in text for option in aiflux_options())


def test_the_reference_lists_no_setting_that_a_command_lacks() -> None:
    text = read(ROOT / "docs" / "reference.md")
    found = 0
    for ctx in leaves():
        section = text.partition(f"# {ctx.command_path}\n")[2].partition("\n```sh")[0]
        whole = re.search(r"^And the \[settings\]\(.*\) under (.*)\.$", section, re.MULTILINE)
        listed = re.findall(r"`(\w+)`(?: \(without ([^)]*)\))?", whole[1]) if whole else ()
        for name, without in listed:
            offered = {each.option for each in SETTINGS if each.section == name and each.offered}
            lacking = offered - option_names(ctx.command)
            assert lacking == {*OPTION.findall(without)}, ctx.command_path
            found += 1
    assert found > 10


def test_the_placeholders_are_up_to_date() -> None:
    made = generator()
    text = read(made.ENGINES)
    assert text == made.with_placeholders(text), "run: python docs/generate.py"


def test_the_endpoints_are_up_to_date() -> None:
    made = generator()
    text = read(made.OUTPUT)
    assert text == made.with_endpoints(text), "run: python docs/generate.py"


def test_the_modules_are_up_to_date() -> None:
    made = generator()
    text = read(made.STRUCTURE)
    assert text == made.with_modules(text), "run: python docs/generate.py"


@pytest.mark.parametrize("path", [*(ROOT / "docs").glob("*.svg")], ids=lambda path: path.name)
def test_pictures_are_self_contained_and_small(path: Path) -> None:
    text = read(path)
    assert len(text) <= 150_000
    assert "url(http" not in text
    assert "href" not in text


def test_the_example_of_env_names_every_setting(tmp_path: Path) -> None:
    made = generator()
    assert read(made.ENV_EXAMPLE) == made.env_example(), "run: python docs/generate.py"
    assert set(read_dotenv(made.ENV_EXAMPLE)) == {
        item.env for item in SETTINGS if item.env and item.offered
    }
    (tmp_path / ".env").write_text(made.env_example(), encoding="utf-8")
    values = Config(environ={}, directory=tmp_path).values
    assert {value.origin for value in values.values()} == {"default"}


@per_page
def test_examples_of_yaml_load(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        if block.startswith("models:"):
            (tmp_path / "models.yaml").write_text(block, encoding="utf-8")
            assert len(read_catalog([tmp_path / "models.yaml"]).models) > 1
            continue
        if "steps:" in block:
            (tmp_path / "steps.yaml").write_text(block, encoding="utf-8")
            (tmp_path / "reviews.csv").write_text("id,text\n1,good\n", encoding="utf-8")
            (tmp_path / "judge.j2").write_text("{{ text }} {{ summary }}", encoding="utf-8")
            (tmp_path / "questions.csv").write_text("question\nWhy?\n", encoding="utf-8")
            (compare,) = blocks(page, "jinja")
            (tmp_path / "compare.j2").write_text(compare, encoding="utf-8")
            for name, field in (("score", "score"), ("verdict", "best")):
                schema = {"type": "object", "properties": {field: {"type": "integer"}}}
                (tmp_path / f"{name}.json").write_text(json.dumps(schema), encoding="utf-8")
            assert len(read_chain(tmp_path / "steps.yaml").steps) > 1
            continue
        file = tmp_path / "aiflux.yaml"
        file.write_text(block, encoding="utf-8")
        content = yaml.safe_load(block)
        # Only the file of a site has limits.
        environ = {"AIFLUX_SITE_CONFIG": str(file)} if "limits" in content else {}
        assert site_limits(environ).keys() == content.pop("limits", {}).keys()
        config = Config(environ=environ, directory=tmp_path)
        config.get_slurm_config().checked()
        given = {name for section in content.values() for name in section}
        assert all(config.values[name].origin != "default" for name in given)


@per_page
def test_examples_of_json_are_json(page: Path) -> None:
    for block in blocks(page, "json"):
        entry = json.loads(block)
        request = entry.get("input", entry)
        if "method" in request:
            # The README's commands name this model.
            model = "llama3.2:3b" if page == ROOT / "README.md" else None
            parse_request(json.dumps(request).encode(), model)


def test_the_python_quick_start_runs_until_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md", "python")
    before, _, submission = block.partition("job_id = ")
    assert submission.startswith("runner.run(input_path=")
    names: dict[str, object] = {}
    compile(submission, "README.md", "exec")
    exec(compile(before, "README.md", "exec"), names)  # noqa: S102
    assert "runner" in names


def test_documented_exit_codes_are_the_actual_ones() -> None:
    table = re.findall(r"^ *\| (\d) \| ", read(ROOT / "docs/output.md"), re.MULTILINE)
    assert [int(code) for code in table] == sorted(ExitCode)


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) < 150


SUFFIXES = ("", ".md", ".sh", ".py", ".yaml", ".def", ".sbatch", ".txt")
TEXTS = [
    path
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "docs", "examples",
                 "container", "entrypoint", "slurm", "aiflux_app", "bench")
    for path in [ROOT / name, *(ROOT / name).rglob("*")]
    if path.is_file() and path.suffix in SUFFIXES
]  # fmt: skip


def test_no_page_refers_to_the_unrelated_pypi_package() -> None:
    """On PyPI, ``aiflux`` is an unrelated project; this distribution is ``aiflux-slurm``."""
    assert len(TEXTS) > 200
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"\b(pip3?|uv|pipx)\b.*\binstall\b.*[\s'\"]aiflux(?![-/\w.])", text)
        assert found is None, f"{path}: {found}"
        assert "aiflux" + "[" not in text.replace("${AIFLUX", ""), path


def test_no_example_removes_or_replaces_files() -> None:
    scripts = [*(ROOT / "examples").rglob("*.sh")]
    assert len(scripts) == 6
    for script in scripts:
        assert not re.search(r"\brm\b|--force", script.read_text(encoding="utf-8")), script
