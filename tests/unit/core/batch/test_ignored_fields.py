"""Fields that Ollama ignores silently cause a warning before submission."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.open import draft_run
from aiflux.engines.kinds import kind_named
from aiflux.errors import InputError
from aiflux.slurm.preflight.local import check_fields
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line, write_input

MESSAGES = [{"role": "user", "content": "x"}]


def written(path: Path, *bodies: dict[str, Any]) -> Path:
    lines = [
        request_line(f"r{index}", body={"model": "m:1", "messages": MESSAGES, **body})
        for index, body in enumerate(bodies)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return written(
        tmp_path / "in.jsonl",
        {"best_of": 3},
        {"best_of": 1, "tool_choice": "auto", "logit_bias": {}, "user": None},
        {"best_of": 2, "tool_choice": "required", "tools": []},
        *({"user": f"u{index}"} for index in range(9)),
        {"logit_bias": {"50256": -100}},
    )


def test_check_reports_ignored_fields_with_count_and_lines(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mixed)]) == 0
    printed = capsys.readouterr().err
    assert "Ollama ignores 'best_of' in 2 requests (lines 1 and 3)" in printed
    assert "Ollama ignores 'tool_choice' in 1 request (line 3)" in printed
    assert "Ollama ignores 'user' in 9 requests (lines 4-8, ...)" in printed
    assert "Ollama ignores 'logit_bias' in 1 request (line 13)" in printed
    assert "--engine-url" in printed


def test_check_reports_ignored_fields_as_json(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mixed), "--json"]) == 0
    ignored = json.loads(capsys.readouterr().out)["ignored"]
    assert ignored["best_of"] == {"requests": 2, "lines": [1, 3]}


def test_ignored_fields_are_counted_across_parts_of_an_input(mixed: Path) -> None:
    rules = kind_named("ollama").input_rules
    whole = scan_input(mixed, rules=rules, children=0)
    assert whole.ignored.keys() == {"best_of", "tool_choice", "user", "logit_bias"}
    for children in (0, 2):
        parts = scan_input(mixed, rules=rules, part_bytes=200, children=children)
        assert parts.ignored == whole.ignored


@pytest.mark.parametrize(
    ("model", "name", "known"),
    [
        ("m:1", "ollama", True),
        ("m:1", "llamacpp", True),
        (None, "vllm", True),
        ("m:2", "ollama", False),
        ("hf:a/b", "vllm", False),
    ],
)
def test_one_scan_serves_several_engines(
    mixed: Path, model: str | None, name: str, known: bool
) -> None:
    kinds = [kind_named(each).input_rules for each in ("ollama", "llamacpp", "vllm")]
    scanned = {name: rule for rules in kinds for name, rule in rules.ignored_fields.items()}
    wide = replace(kinds[1], ignored_fields=scanned)
    rules = kind_named(name).input_rules
    found = scan_input(mixed, "m:1", rules=wide).of_engine(model, rules, scanned)
    if known:
        assert found == scan_input(mixed, model, rules=rules)
    else:
        assert found is None
        with pytest.raises(InputError, match="lines are wrong"):
            scan_input(mixed, model, rules=rules)


def test_a_scan_does_not_serve_an_engine_without_the_model_of_the_requests(
    mixed: Path,
) -> None:
    write_input(mixed, 3, body={"messages": MESSAGES})
    rules = kind_named("ollama").input_rules
    assert scan_input(mixed, "m:1").of_engine(None, rules, rules.ignored_fields) is None
    assert scan_input(mixed, "m:1").of_engine("m:1", rules, {}) is None, "it saw no fields"


def test_the_preflight_warns_for_ollama_only(mixed: Path, tmp_path: Path) -> None:
    ours = kind_named("ollama")
    opened = draft_run(mixed, tmp_path / "a.json", RunOptions(), tmp_path, ours).open()
    findings = [*check_fields(opened.plan)]
    assert [finding.level for finding in findings] == ["warning"] * 4
    other = RunOptions(engine_url="http://127.0.0.1:1")
    opened = draft_run(mixed, tmp_path / "b.json", other, None, kind_named("external")).open()
    assert not [*check_fields(opened.plan)]


def test_a_server_at_an_address_gets_no_warning(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyEngine() as engine:
        words = ["--input", str(mixed), "--output", "o.json", "--engine-url", engine.url]
        assert main(["run", *words]) == 0
    assert "ignores" not in capsys.readouterr().err
