"""``aiflux check``: read an input once and report every invalid line."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, MODEL, argument, command, option, settings_options
from aiflux.core.batch.input_file import NOTHING_SENT, InputRules, InputSummary, scan_input
from aiflux.core.batch.request import adapted_text, ignored_texts
from aiflux.core.batch.schema import can_check_schemas
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SETTINGS, RunOptions, given_settings
from aiflux.core.runs.input_copy import temporary_copy
from aiflux.core.runs.open import with_long_prompts
from aiflux.core.runs.plan import Plan, input_rules, make_plan
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.errors import AifluxError, InputError
from aiflux.slurm.preflight.local import check_lengths, finding_text
from aiflux.util.extras import remedy
from aiflux.util.records import to_json
from aiflux.util.text import counted, public_url

_OF_LENGTHS = {
    "engine", "engine_url", "engine_ca", "context_length", "max_tokens", "too_long", "models_dir",
}  # fmt: skip
_WITHOUT = {setting.name for setting in SETTINGS} - _OF_LENGTHS


@command("check", examples=["aiflux check prompts.jsonl --model llama3.2:3b"])
@argument("file", metavar="FILE", type=FILE, help="Requests, *.jsonl")
@option(
    "-m", "--model", metavar="NAME:TAG", type=MODEL, help="The run's model (default: as for run)"
)
@option("--replace-model", is_flag=True, help="As for run: accept requests for other models")
@json_option("Print the result as JSON, including problems")
@settings_options("run", "paths", without=_WITHOUT)
def check(file: str, model: str | None, replace_model: bool, as_json: bool, **settings: Any) -> int:
    """Read the whole input once and report every invalid line, and prompts that are too long."""
    path = Path(file)
    given = {"model": model, "replace_model": replace_model or None, **given_settings(settings)}
    config = Config(arguments=given)
    model = config.get("model")
    kind = kind_named(config.engine)
    options = RunOptions(
        lora=config.get("lora"),
        tool_parser=config.get("tool_parser"),
        replace_model=config.get("replace_model"),
        samples=config.get("samples"),
        temperature=config.get("temperature"),
    )
    rules = input_rules(kind, options)
    if as_json:
        return _as_json(path, config, model, rules)
    summary, plan = _checked(path, config, model, rules)
    endpoints = ", ".join(f"{url} ({count})" for url, count in summary.endpoints.items())
    models = ", ".join(summary.models) or f"{model} (the run's; no request names one)"
    requests, size = counted(summary.requests, "request"), counted(summary.size, "byte")
    print(f"{summary.path}: {requests}, {size}, no problems")
    print(f"  endpoints: {endpoints}")
    print(f"  models:    {models}")
    if summary.adapted:
        print(f"  note:      {adapted_text(summary.adapted)}")
    print(
        f"  context:   about {counted(summary.context_tokens, 'token')} for 99 % of the requests, "
        f"{summary.longest_tokens} for the longest"
    )
    for text, fix in ignored_texts(summary.ignored, kind.title, rules.ignored_fields):
        print(f"warning: {text}\n     -> {fix}", file=sys.stderr)
    unchecked = _unchecked(plan)
    if unchecked is not None:
        print(f"  lengths:   not checked: {unchecked}")
    if not isinstance(plan, str):
        for finding in check_lengths(plan):
            print(f"warning: {finding_text(finding)}", file=sys.stderr)
    if not can_check_schemas():
        how = remedy("schema", has_pip=find_spec("pip") is not None)
        print(f"  schemas:   not checked (jsonschema is not installed); {how}")
    return 0


def _checked(
    path: Path, config: Config, model: str | None, rules: InputRules
) -> tuple[InputSummary, Plan | str]:
    """Return what the input contains, and the plan of a run of it, or why there is none."""
    try:
        with temporary_copy(path) as (plain, source):
            schemas = can_check_schemas()
            found = scan_input(plain, model, rules=rules, schemas=schemas, source=source)
            plan = _planned(found, config)
    except InputError as error:
        error.message = error.message.removesuffix(NOTHING_SENT)
        raise
    return replace(found, path=found.named, source=None), plan


def _planned(summary: InputSummary, config: Config) -> Plan | str:
    """Return the plan of a run, with its long prompts; or why it would be refused.

    Raises:
        InputError: prompts are too long.
    """
    try:
        options = replace(config.run_options(), lora={})
        kind = engine_kind(options)
        plan = make_plan(summary, summary.path, options, config.models_dir, kind)
    except AifluxError as error:
        return error.message
    return with_long_prompts(plan, summary, kind, config.models_dir)[0]


def _unchecked(plan: Plan | str) -> str | None:
    """Return why the prompts were not compared with the context; None if they were."""
    if isinstance(plan, str):
        return plan
    if not plan.lengths_at_start or plan.long_prompts is not None:
        return None
    url = plan.options.engine_url
    if url is None:
        return "the server is not started yet; a run compares the prompts with the context later"
    return (
        f"{public_url(url)} does not answer, does not report its context or does not count tokens; "
        "a run asks again before it sends requests"
    )


def _as_json(path: Path, config: Config, model: str | None, rules: InputRules) -> int:
    try:
        summary, plan = _checked(path, config, model, rules)
    except InputError as error:
        print_json({"path": path.absolute(), "problems": [error.message, *error.problems]})
        raise
    long = None if isinstance(plan, str) else plan.long_prompts
    content = {"ignored": {}, **to_json(replace(summary, marks=())), "problems": []}
    content["long_prompts"] = None if long is None else to_json(long)
    content["lengths_not_checked"] = _unchecked(plan)
    del content["marks"]
    print_json(content)
    return 0
