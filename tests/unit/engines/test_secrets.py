"""The engine's key is stored and shown nowhere, however the engine echoes it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.engines.secrets import HIDDEN, Secrets
from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine, Reply
from tests.unit.working import Working

KEY = "sk-Ab12/Cd+34&<ef>=="
PASSWORD = "pass/wörd&1"
BASIC = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()


def written(secret: str) -> list[str]:
    """Return a secret in the notations of several servers."""
    return [
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret).replace("/", "\\/")[1:-1],
        quote(secret, safe=""),
        html.escape(secret),
        base64.b64encode(secret.encode()).decode(),
    ]


def forms(key: str) -> list[str]:
    bare = key.removeprefix("Basic ")
    more = [f"user:{PASSWORD}", PASSWORD] if key.startswith("Basic ") else []
    return [form for each in (bare, *more) for form in written(each)]


def everything(tmp_path: Path, working: Working) -> str:
    """Return all files and messages of a run."""
    files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    return "\n".join([*files, *working.reporter.messages, str(working.error)])


@pytest.mark.parametrize("key", [KEY, BASIC], ids=["bearer", "basic"])
@pytest.mark.parametrize("status", [400, 500, 503, 401, 403, 404, 302])
def test_a_key_in_an_error_is_stored_nowhere(
    tmp_path: Path, key: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    echoed = " ".join(forms(key))
    padding = "x" * 490  # a long message is cut in the middle of the key

    def instead(method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        if method == "GET":
            return None
        assert headers["Authorization"].endswith(key)
        body = json.dumps({"error": {"message": f"{padding}{echoed}", "headers": echoed}})
        where = f"https://login.example/{quote(forms(key)[0], safe='')}"
        return status, body.encode(), {"Location": where, "X-Key": "x", "Retry-After": "0"}

    monkeypatch.setenv("AIFLUX_API_KEY", key)
    with FaultyEngine(instead=instead) as engine:
        working = Working(
            tmp_path, engine.url, max_retries=1, api_key=key, engine_wait=0.1
        ).prompts("a", "b")
        assert working.run() in (ExitCode.FAILURES, ExitCode.ENGINE)
        if working.error is not None and working.error.exit_code is ExitCode.FAILURES:
            assert main(["report", str(working.output)]) == 0
    left = everything(tmp_path, working)
    found = [form for form in forms(key) if form in left]
    assert not found
    assert key not in left
    assert "user:pass" not in left


@pytest.mark.parametrize("fault", ["error", "notjson"])
def test_a_key_in_an_invalid_200_is_stored_nowhere(tmp_path: Path, fault: str) -> None:
    def instead(method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        echo = {"error": {"message": f"bad {headers.get('Authorization')}"}}
        whole = json.dumps(echo).encode()
        return (200, whole if fault == "error" else whole[:-1], {}) if method == "POST" else None

    with FaultyEngine(instead=instead) as engine:
        working = Working(
            tmp_path, engine.url, max_retries=0, api_key="sk-secret-1", engine_wait=0.1
        ).prompts("a")
        assert working.run() in (ExitCode.FAILURES, ExitCode.ENGINE)
    left = everything(tmp_path, working)
    assert "sk-secret-1" not in left
    assert HIDDEN in left


def test_an_answer_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Answers are data: a model never sees the key, and a dummy key may be a common word."""
    with FaultyEngine(answer="ask ollama or sk-secret-1") as engine:
        working = Working(tmp_path, engine.url, api_key="ollama").prompts("a")
        assert working.run() is ExitCode.OK
    content = working.results[0]["output"]["choices"][0]["message"]["content"]
    assert content == "ask ollama or sk-secret-1"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=6), st.text())
def test_json_stays_json(key: str, around: str) -> None:
    content = json.dumps({"message": around + key + around, key: [key]}).encode()
    left = json.loads(Secrets.of(key).hide_bytes(content))
    assert key not in left.values()
    assert [HIDDEN] in left.values()


@pytest.mark.parametrize("key", ["none", "EMPTY", "ollama", "x", "Bearer x"])
def test_a_placeholder_key_changes_no_words(key: str) -> None:
    text = "none of it is EMPTY: ollama x"
    assert Secrets.of(key).hide(text) == text


keys = st.text(st.sampled_from('aZ09-_./+=&"\\'), min_size=1, max_size=5)


@given(keys.filter(lambda key: key != "-"))
def test_a_short_key_is_hidden_as_a_separate_word(key: str) -> None:
    hidden = Secrets.of(f"Bearer {key}").hide(f"the server says: {key} !")
    assert hidden == f"the server says: {HIDDEN} !"


def test_a_short_key_changes_no_longer_words() -> None:
    assert Secrets.of("pw").hide("pwd and pw, not pw2") == f"pwd and {HIDDEN}, not pw2"
    basic = "Basic " + base64.b64encode(b"user:h4x").decode()
    assert Secrets.of(basic).hide("wrong password h4x") == f"wrong password {HIDDEN}"


@pytest.mark.parametrize("key", [None, KEY])
def test_a_password_in_an_address_is_hidden(key: str | None) -> None:
    content = b'{"error": {"message": "no route to https://user:pass-w0rd@host:80/v1, user@host"}}'
    hidden = Secrets.of(key).hide_bytes(content)
    assert json.loads(hidden)["error"]["message"] == (
        f"no route to https://{HIDDEN}@host:80/v1, user@host"
    )
    assert Secrets.of(key).hide("plain http://host/a@b:c") == "plain http://host/a@b:c"


@pytest.mark.parametrize("depth", [150, 900, 5000])
def test_deeply_nested_answers_are_searched_too(depth: int) -> None:
    content = "[" * depth + f'"{KEY}"' + "]" * depth
    hidden = Secrets.of(KEY).hide_bytes(content.encode()).decode()
    assert KEY not in hidden
    assert HIDDEN in hidden
