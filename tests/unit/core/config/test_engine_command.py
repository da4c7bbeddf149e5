"""The command of an engine: its placeholders, and the other ways to name an engine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.config.config import Config
from aiflux.core.config.engine_command import (
    PLACEHOLDERS,
    command_words,
    engine_command,
    filled_words,
)
from aiflux.core.config.settings import RunOptions
from aiflux.errors import ConfigError

COMMAND = "vllm serve {model} --uds {socket}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("vllm serve {model}", "with {socket} or {port}, which is where the server listens"),
        ("vllm serve {modle} --port {port}", "{modle} is unknown: did you mean 'model'?"),
        ("x --root ${HOME} --port {port}", "{HOME} is unknown"),
        ("x 'a {port}", "whose quotes are closed"),
        ("./serve.sh {port}", "'./serve.sh' depends on the current directory"),
        ("bin/serve {port}", "'bin/serve' depends on the current directory"),
        ("x {port} | tee log", "without '|', as no shell runs it"),
        ("x {port} && y", "without '&&'"),
        (
            "A=1 vllm serve --port {port}",
            "without the assignment 'A=1', as no shell runs it: use "
            "--engine-env A=1, or begin with env A=1",
        ),
        ("'' {port}", "a command"),
        ("", "a text that is not empty"),
        ("x {port}\ny", "a text of one line"),
    ],
)
def test_a_wrong_command_is_refused_with_the_reason(command: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^a ") as caught:
        engine_command(command)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        COMMAND,
        "/opt/a b/serve {port}".replace("a b", "'a b'"),
        'bash -c \'exec vllm serve "$0" --port "$1" | tee log\' {model} {port}',
        'vllm serve m --port {port} --speculative-config \'{"a": {"b":{}}}\'',
    ],
)
def test_a_good_command_is_kept_as_it_is(command: str) -> None:
    assert engine_command(command) == command


@given(st.text(min_size=1))
def test_a_value_stays_within_its_word(model: str) -> None:
    command = "a '{model} b' x{model} {port} {{model}}"
    filled = filled_words(command, {"model": model, "port": 7})
    assert filled == ["a", f"{model} b", f"x{model}", "7", "{model}"]


@given(st.recursive(st.integers() | st.text(), lambda each: st.dictionaries(st.text(), each)))
def test_braces_of_json_are_left_alone(content: object) -> None:
    text = json.dumps({"a": content})
    command = f"x {{port}} {shlex.quote(text)}"
    if not re.search(r"\{\w+\}", text, re.ASCII):  # a name in braces is a placeholder, or refused
        assert filled_words(command, {"port": 1})[2] == text


def test_a_placeholder_is_known_for_each_value() -> None:
    values = dict.fromkeys(PLACEHOLDERS, 1)
    command = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    assert filled_words(command, values) == ["1"] * len(values)
    assert command_words("a  'b c'") == ["a", "b c"]


# --- among the other ways to name an engine ------------------------------------------------------


def config(
    folder: Path, yaml: str = "", environ: dict[str, str] | None = None, **arguments: str
) -> Config:
    (folder / "aiflux.yaml").write_text(yaml, encoding="utf-8")
    variables = {"HOME": str(folder), **(environ or {})}
    return Config(arguments=arguments, environ=variables, directory=folder)


@pytest.mark.parametrize("source", ["argument", "environment", "file"])
def test_a_command_can_come_from_each_source(tmp_path: Path, source: str) -> None:
    made = {
        "argument": lambda: config(tmp_path, engine_command=COMMAND),
        "environment": lambda: config(tmp_path, environ={"AIFLUX_ENGINE_COMMAND": COMMAND}),
        "file": lambda: config(tmp_path, f"run: {{engine_command: '{COMMAND}'}}"),
    }[source]()
    assert made.engine == "command"
    options = made.run_options()
    assert (options.engine, options.engine_command) == ("command", COMMAND)
    assert ("engine_command" in made.decided_here) is (source == "file")


@pytest.mark.parametrize(
    ("yaml", "variables", "arguments", "engine"),
    [
        (f"run: {{engine_command: '{COMMAND}'}}", {}, {"engine": "vllm"}, "vllm"),
        (f"run: {{engine_command: '{COMMAND}'}}", {"AIFLUX_ENGINE": "ollama"}, {}, "ollama"),
        (f"run: {{engine_command: '{COMMAND}'}}", {}, {"engine_url": "http://h"}, "external"),
        ("run: {engine: vllm}", {}, {"engine_command": COMMAND}, "command"),
        ("run: {engine_url: 'http://h'}", {"AIFLUX_ENGINE_COMMAND": COMMAND}, {}, "command"),
        ("", {"AIFLUX_ENGINE_COMMAND": COMMAND}, {"engine": "llamacpp"}, "llamacpp"),
        ("", {"AIFLUX_ENGINE_URL": "http://h"}, {"engine": "llamacpp"}, "llamacpp"),
        ("run: {engine_url: 'http://h'}", {"AIFLUX_ENGINE": "ollama"}, {}, "ollama"),
        ("run: {engine: vllm}", {}, {"engine_url": "http://h"}, "external"),
        ("run: {engine_url: null, engine: vllm}", {}, {}, "vllm"),
    ],
)
def test_the_source_with_precedence_names_the_engine(
    tmp_path: Path, yaml: str, variables: dict[str, str], arguments: dict[str, str], engine: str
) -> None:
    made = config(tmp_path, yaml, variables, **arguments)
    assert made.engine == engine
    assert made.run_options().engine == engine


@pytest.mark.parametrize("other", [("engine", "vllm"), ("engine_url", "http://h")])
def test_two_engines_of_one_source_are_refused(tmp_path: Path, other: tuple[str, str]) -> None:
    name, value = other
    with pytest.raises(ConfigError, match=f"argument: {name} and engine_command") as caught:
        config(tmp_path, engine_command=COMMAND, **{name: value})
    assert "remove one of them" in str(caught.value.remedy)
    text = f"run:\n  {name}: {value}\n  engine_command: '{COMMAND}'\n"
    with pytest.raises(ConfigError, match=r"aiflux.yaml, line 2 and .*aiflux.yaml, line 3: "):
        config(tmp_path, text)
    with pytest.raises(ConfigError, match="argument: engine and engine_url are both given"):
        config(tmp_path, engine="ollama", engine_url="http://h")
    with pytest.raises(ConfigError, match="both set"):
        RunOptions(engine_url="http://h", engine_command=COMMAND)


def test_the_key_does_not_go_to_a_server_that_only_this_directory_starts(tmp_path: Path) -> None:
    key = {"AIFLUX_API_KEY": "k"}
    local = config(tmp_path, f"run: {{engine_command: '{COMMAND}'}}", key)
    with pytest.raises(ConfigError, match=r"a server that only .*aiflux.yaml, line 1 starts: vllm"):
        local.run_options()
    assert config(tmp_path, "", key, engine_command=COMMAND).run_options().engine == "command"
