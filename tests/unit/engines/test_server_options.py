"""Options for the engine's server: what reaches it, what is refused, and how a wrong one ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.core.config.engine_kinds import KINDS
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.open import draft_run
from aiflux.engines.base import Engine
from aiflux.engines.kinds import kind_named
from aiflux.engines.llamacpp.options import MANAGED as LLAMACPP
from aiflux.engines.server_options import refuse_managed
from aiflux.engines.vllm.options import MANAGED as VLLM
from aiflux.errors import ConfigError, EngineError, ExitCode, RejectedError, RunConflictError
from aiflux.slurm.preflight.local import check_fields
from tests.unit.engines.test_contract import FakeLlamaServer, FakeVllm
from tests.unit.helpers import logged_command, request_line
from tests.unit.made_snapshots import put_snapshot
from tests.unit.working import Working

ENDPOINTS = {"/v1/chat/completions": 1}
INPUT = request_line("a", body={"messages": [{"role": "user", "content": "x"}]}) + "\n"


def options_of(folder: Path, *given: str, engine: str = "vllm") -> RunOptions:
    """Return the options of a command line with ``--engine-arg``."""
    arguments = {"engine_arg": given, "engine": engine}
    return Config(arguments=arguments, environ={}, directory=folder).run_options()


@pytest.fixture(params=[FakeVllm, FakeLlamaServer], ids=lambda site: site.__name__)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeVllm | FakeLlamaServer]:
    made = request.param(tmp_path)
    yield made
    made.close()


def engine_with(site: FakeVllm | FakeLlamaServer, **given: str) -> Engine:
    site.options |= {"engine": site.kind.name, "engine_arg": given}
    return site.make()


def words(site: FakeVllm | FakeLlamaServer) -> list[str]:
    return logged_command(site.folder / "engine-0.log")


def test_options_and_flags_reach_the_server(tmp_path: Path) -> None:
    vllm = FakeVllm(tmp_path / "vllm")
    engine = engine_with(vllm, dtype="half", **{"enable-expert-parallel": ""})
    engine.start()
    assert words(vllm)[-2:] == ["--dtype=half", "--enable-expert-parallel"]
    vllm.close()
    llama = FakeLlamaServer(tmp_path / "llama")
    engine = engine_with(llama, **{"-ctk": "q8_0", "swa-full": ""})
    engine.start()
    assert words(llama)[-3:] == ["-ctk", "q8_0", "--swa-full"]
    llama.close()


@pytest.mark.parametrize("spelling", ["max_lora", "max-lora", "--max-lora", "--max_lora"])
def test_a_name_may_be_spelt_as_the_servers_accept_it(tmp_path: Path, spelling: str) -> None:
    assert options_of(tmp_path, f"{spelling}=a_b").engine_arg == {"max-lora": "a_b"}
    assert options_of(tmp_path, spelling).engine_arg == {"max-lora": ""}


def test_the_environment_and_yaml_files_set_them_too(tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text(
        "run:\n  engine: vllm\n  engine_arg: {dtype: half, swap_space: 4, enforce-eager: }\n",
        encoding="utf-8",
    )
    expected = {"dtype": "half", "swap-space": "4", "enforce-eager": ""}
    assert Config(environ={}, directory=tmp_path).run_options().engine_arg == expected
    environ = {"AIFLUX_ENGINE_ARG": "--dtype=half 'hf-overrides={\"a\": 1}' enforce-eager"}
    found = Config(environ=environ, directory=tmp_path).run_options().engine_arg
    assert found == {"dtype": "half", "hf-overrides": '{"a": 1}', "enforce-eager": ""}
    with pytest.raises(ConfigError, match=r"AIFLUX_ENGINE_ARG.* is wrong"):
        Config(environ={"AIFLUX_ENGINE_ARG": "dtype='half"}, directory=tmp_path)


@pytest.mark.parametrize("text", ["=x", "--=x", "----dtype=x", "a b=x", "é=x"])
def test_a_text_without_a_name_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="engine_arg"):
        options_of(tmp_path, text)


@pytest.mark.parametrize(
    ("engine", "text", "remedy"),
    [
        ("vllm", "max_num_seqs=4", "use --slots"),
        ("vllm", "--max-num-seqs=4", "use --slots"),
        ("vllm", "max-num=4", "use --slots"),
        ("vllm", "-tp=2", "use --gpus-per-engine"),
        ("vllm", "nnodes=2", "use --nodes-per-engine"),
        ("vllm", "served-model-name=x", "use --model"),
        ("vllm", "max-model-len=9", "use --context-length"),
        ("vllm", "por=80", "leave it out: the server listens on loopback"),
        ("vllm", "api_key=x", "leave it out: the server listens on loopback"),
        ("vllm", "no-enable-lora", "use --lora"),
        ("vllm", "no-enable-auto", "use --tool-parser"),
        ("vllm", "config.model=x", "give its options by themselves"),
        ("llamacpp", "-c=9", "use --context-length"),
        ("llamacpp", "ctx_size=9", "use --context-length"),
        ("llamacpp", "np=4", "use --slots"),
        ("llamacpp", "-a=x", "use --model"),
        ("llamacpp", "n-gpu-layers=1", "--allow-cpu"),
        ("llamacpp", "api-key=x", "leave it out: the server listens on loopback"),
        ("llamacpp", "mlock=--host", "give each option by itself"),
        ("ollama", "num_parallel=4", "--engine-env OLLAMA_FLASH_ATTENTION=1"),
    ],
)  # fmt: skip
def test_what_aiflux_sets_itself_is_refused_with_its_own_setting(
    tmp_path: Path, engine: str, text: str, remedy: str
) -> None:
    options = options_of(tmp_path, text, engine=engine)
    with pytest.raises(ConfigError, match="--engine-arg") as caught:
        kind_named(engine).refuse_run(options, ENDPOINTS)
    assert remedy in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("engine", "text", "seen", "remedy"),
    [
        ("llamacpp", "help", "help is not available for llama.cpp", "run llama-server with it"),
        ("llamacpp", "m=x", "m is not available for llama.cpp", "use --model"),
        ("vllm", "por=1", "por is not available for vLLM: it is the beginning of --port",
         "leave it out: the server listens on loopback"),
        ("vllm", "max-lor=1", "is the beginning of --max-lora-rank and --max-loras", "use --lora"),
        ("vllm", "m=x", "it is the beginning of --master-addr, --master-port, --max-cpu-loras and "
         "5 others", "write the option's whole name"),
    ],
)  # fmt: skip
def test_a_refused_option_is_named_as_it_was_given(
    tmp_path: Path, engine: str, text: str, seen: str, remedy: str
) -> None:
    options = options_of(tmp_path, text, engine=engine)
    with pytest.raises(ConfigError) as caught:
        kind_named(engine).refuse_run(options, ENDPOINTS)
    assert caught.value.message.startswith(f"--engine-arg {text.partition('=')[0]} is not ")
    assert caught.value.message.endswith(seen)
    assert str(caught.value.remedy).startswith(remedy)


@given(st.sampled_from(sorted(VLLM)), st.data())
def test_no_beginning_of_a_managed_name_of_vllm_gets_through(
    name: str, data: st.DataObject
) -> None:
    """argparse accepts any beginning that only one option has."""
    key = name[: data.draw(st.integers(1, len(name)))]
    with pytest.raises(ConfigError):
        refuse_managed("vLLM", {key: "x"}, VLLM, abbreviated=True)


def test_what_aiflux_passes_is_managed_or_may_be_given_again(site: FakeVllm) -> None:
    """Where a user's value would take the place of ours, the option is refused."""
    site.make().start()
    managed = VLLM if site.kind.name == "vllm" else LLAMACPP
    passed = {word.lstrip("-").partition("=")[0] for word in words(site) if word[:1] == "-"}
    free = {"enforce-eager"} if site.kind.name == "vllm" else {"threads-http", "jinja"}
    assert passed - managed.keys() - {"t"} == free  # -t only if not all CPUs may be used


@pytest.mark.parametrize("engine", KINDS)
def test_every_kind_passes_options_on_or_refuses_them(engine: str) -> None:
    """None ignores them."""
    url, command = {"engine_url": "http://127.0.0.1:1"}, {"engine_command": "x {port}"}
    given: dict[str, Any] = {"external": url, "command": command}.get(engine, {"engine": engine})
    options = RunOptions(engine_arg={"mlock": ""}, **given)
    if engine in ("vllm", "llamacpp"):
        kind_named(engine).refuse_run(options, ENDPOINTS)
    else:
        with pytest.raises(ConfigError, match="--engine-arg"):
            kind_named(engine).refuse_run(options, ENDPOINTS)


def test_an_option_that_the_server_does_not_know_ends_its_start_at_once(
    site: FakeVllm | FakeLlamaServer,
) -> None:
    engine = engine_with(site, **{"no-such-option": "1"})
    with pytest.raises(RejectedError, match="does not accept --engine-arg") as caught:
        engine.start()
    assert "--no-such-option" in caught.value.message
    assert len(site.started()) == 1


def test_a_refusal_of_an_earlier_start_is_not_taken_for_a_later_one(site: FakeVllm) -> None:
    with pytest.raises(RejectedError):
        engine_with(site, **{"no-such-option": "1"}).start()
    site.wrap(["sh", "-c", "echo out of luck; exit 3"])
    with pytest.raises(EngineError, match="out of luck") as caught:
        engine_with(site, mlock="").start()
    assert not isinstance(caught.value, RejectedError)
    assert "no-such-option" not in caught.value.message
    assert "check --engine-arg" in str(caught.value.remedy)


def test_a_run_keeps_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They belong to the plan's identity, and a run shows them."""
    monkeypatch.chdir(tmp_path)
    kind = kind_named("vllm")
    put_snapshot(tmp_path / "models" / "hub", "org/tiny")
    path = tmp_path / "in.jsonl"
    path.write_text(INPUT, encoding="utf-8")

    def draft(**given: Any) -> Any:
        options = RunOptions(engine="vllm", model="hf:org/tiny", **given)
        return draft_run(path, tmp_path / "o.json", options, tmp_path / "models", kind)

    plain, half = draft().plan, draft(engine_arg={"dtype": "half"}).plan
    assert "engine_arg" not in plain.identity
    assert plain.id != half.id
    opened = draft(engine_arg={"dtype": "half", "enforce-eager": ""}).open()
    opened.run.journal(0).write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(RunConflictError, match=r"started with .*--engine-arg dtype=half"):
        draft()
    assert main(["status", "o.json"]) == 0
    shown = capsys.readouterr().out
    assert "--engine-arg dtype=half --engine-arg enforce-eager" in shown
    assert main(["report", "o.json"]) == 0
    assert "dtype" in (tmp_path / "o.json.aiflux" / "report.html").read_text(encoding="utf-8")


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
ASKS = [{"role": "user", "content": "What time is it?"}]


def with_tools(folder: Path, *bodies: dict[str, Any]) -> Path:
    path = folder / "in.jsonl"
    lines = [request_line(f"r{at}", body={"messages": ASKS, "tools": [TOOL], **body})
             for at, body in enumerate(bodies)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_parsers_reach_vllm_and_answers_with_tool_calls_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tool call is an answer without text, and the reasoning is kept."""
    site = FakeVllm(tmp_path)
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(site.program))
    monkeypatch.setenv("AIFLUX_ENGINE", "vllm")
    run = Working(tmp_path, None, models_dir=site.models_dir, engine="vllm", model=site.model,
                  slots=2, tool_parser="hermes", reasoning_parser="qwen3")  # fmt: skip
    run.input = with_tools(tmp_path, {}, {"tool_choice": "none"})
    assert run.run() is ExitCode.OK, run.error
    called, spoken = (each["output"]["choices"][0]["message"] for each in run.results)
    assert called["tool_calls"][0]["function"]["name"] == "now"
    assert spoken["content"] == "What time is it?"
    assert called["reasoning"] == spoken["reasoning"] == "I repeat it."
    assert run.results[0]["metadata"]["attempts"] == 1
    monkeypatch.chdir(tmp_path)
    assert main(["status", "out.json"]) == 0
    shown = capsys.readouterr().out
    assert "2 answered, 1 with a tool call" in shown
    assert "--tool-parser hermes --reasoning-parser qwen3" in shown


def test_a_parser_that_vllm_does_not_have_ends_its_start_at_once(tmp_path: Path) -> None:
    for name, value in (("tool_parser", "hermez"), ("reasoning_parser", "r2")):
        site = FakeVllm(tmp_path / name)
        site.options |= {"engine": "vllm", name: value}
        with pytest.raises(RejectedError, match=f"invalid .* parser: {value}") as caught:
            site.make().start()
        assert f"--{name.replace('_', '-')}" in caught.value.message
        site.close()


def test_requests_with_tools_and_no_parser_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_tools(tmp_path, {}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "required"})
    monkeypatch.setenv("AIFLUX_ENGINE", "vllm")
    assert main(["check", "in.jsonl", "--model", "hf:org/tiny"]) == 0
    warning = capsys.readouterr().err
    assert "vLLM rejects 'tools' in 2 requests (lines 1 and 4)" in warning
    assert "-> name the model's parser, such as --tool-parser hermes" in warning
    options = {"engine": "vllm", "model": "hf:org/tiny"}
    plain, parsed = (
        Working(tmp_path, None, models_dir=tmp_path, **options, **more).open().plan
        for more in ({}, {"tool_parser": "hermes"})
    )
    (finding,) = check_fields(plain)
    assert (finding.level, "--tool-parser" in finding.fix) == ("warning", True)
    assert not [*check_fields(parsed)]
    monkeypatch.setenv("AIFLUX_TOOL_PARSER", "hermes")
    assert main(["check", "in.jsonl", "--model", "hf:org/tiny"]) == 0
    assert capsys.readouterr().err == ""
    assert plain.id != parsed.id


def test_llama_server_parses_tool_calls_itself(tmp_path: Path) -> None:
    kind = kind_named("llamacpp")
    with pytest.raises(ConfigError, match="--tool-parser") as caught:
        kind.refuse_run(RunOptions(engine="llamacpp", tool_parser="hermes"), ENDPOINTS)
    assert "llama.cpp parses tool calls itself" in str(caught.value.remedy)
    site = FakeLlamaServer(tmp_path)
    site.options |= {"engine": "llamacpp", "reasoning_parser": "deepseek"}
    site.make().start()
    assert "--jinja" in words(site)
    assert words(site)[-2:] == ["--reasoning-format", "deepseek"]
    site.close()


@pytest.mark.parametrize("name", ["tool_parser", "reasoning_parser"])
def test_ollama_needs_no_parsers(name: str) -> None:
    given: dict[str, Any] = {name: "hermes"}
    with pytest.raises(ConfigError, match="Ollama does not support --") as caught:
        kind_named("ollama").refuse_run(RunOptions(**given), ENDPOINTS)
    assert "Ollama parses tool calls and reasoning itself" in str(caught.value.remedy)
