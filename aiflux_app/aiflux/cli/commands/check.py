"""``aiflux check``: read an input once and report every invalid line."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, MODEL, argument, command, option
from aiflux.core.batch.input_file import InputRules, scan_input
from aiflux.core.batch.request import ignored_texts
from aiflux.core.batch.schema import can_check_schemas
from aiflux.core.config.config import Config
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import input_rules
from aiflux.engines.kinds import kind_named
from aiflux.errors import InputError
from aiflux.util.extras import remedy
from aiflux.util.records import to_json


@command("check", examples=["aiflux check prompts.jsonl --model llama3.2:3b"])
@argument("file", metavar="FILE", type=FILE, help="Requests, *.jsonl")
@option(
    "-m", "--model", metavar="NAME:TAG", type=MODEL, help="The run's model (default: as for run)"
)
@json_option("Print the result as JSON, including problems")
def check(file: str, model: str | None, as_json: bool) -> int:
    """Read the whole input once and report every invalid line."""
    path = Path(file)
    config = Config(arguments={"model": model})
    model = config.get("model")
    kind = kind_named(config.engine)
    options = RunOptions(lora=config.get("lora"), tool_parser=config.get("tool_parser"))
    rules = input_rules(kind, options)
    if as_json:
        return _as_json(path, model, rules)
    summary = scan_input(path, model, rules=rules, schemas=can_check_schemas())
    endpoints = ", ".join(f"{url} ({count})" for url, count in summary.endpoints.items())
    models = ", ".join(summary.models) or f"{model} (the run's; no request names one)"
    print(f"{summary.path}: {summary.requests} requests, {summary.size} bytes, no problems")
    print(f"  endpoints: {endpoints}")
    print(f"  models:    {models}")
    print(
        f"  context:   about {summary.context_tokens} tokens for 99 % of the requests, "
        f"{summary.longest_tokens} for the longest"
    )
    for text, fix in ignored_texts(summary.ignored, kind.title, rules.ignored_fields):
        print(f"warning: {text}\n     -> {fix}", file=sys.stderr)
    if not can_check_schemas():
        how = remedy("schema", has_pip=find_spec("pip") is not None)
        print(f"  schemas:   not checked (jsonschema is not installed); {how}")
    return 0


def _as_json(path: Path, model: str | None, rules: InputRules) -> int:
    try:
        summary = scan_input(path, model, rules=rules, schemas=can_check_schemas())
    except InputError as error:
        print_json({"path": path.absolute(), "problems": [error.message, *error.problems]})
        raise
    content = {"ignored": {}, **to_json(replace(summary, marks=())), "problems": []}
    del content["marks"]
    print_json(content)
    return 0
