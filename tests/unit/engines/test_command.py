"""A server that ``--engine-command`` starts: what it gets, how it fails, and how a run ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.base import Engine
from aiflux.engines.kinds import kind_named
from aiflux.errors import ConfigError, EngineError, ExitCode, RejectedError, RunConflictError
from aiflux.util.text import without_secrets
from tests.tools import make_tiny_gguf
from tests.tools.engine_contract import engine_of, sessions, until
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.working import Working

SERVER = Path(__file__).parents[2] / "tools" / "command_server.py"
KIND = kind_named("command")
PORT = f"{shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} --model {{model}} --port {{port}}"
SOCKET = PORT.replace("--port {port}", "--socket {socket}")


class Site:
    """A folder where engines run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = dict(os.environ)
        self.home = folder / "home"
        self.made: list[Engine] = []

    def plan(self, command: str, model: str = "m:1", **options: Any) -> Plan:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        path = write_input(self.folder / "in.jsonl", 1, body=body)
        made = RunOptions(model=model, engine_command=command, **options)
        return make_plan(scan_input(path, model), self.folder / "o.json", made, None, KIND)

    def engine(self, command: str, devices: tuple[str, ...] = (), **options: Any) -> Engine:
        plan = self.plan(command, **options)
        engine = engine_of(KIND, plan, self.folder, self.environ, devices, home=self.home)
        self.made.append(engine)
        return engine

    @property
    def log(self) -> Path:
        return self.folder / "engine-0.log"

    def recorded(self, command: str, devices: tuple[str, ...] = (), **options: Any) -> Any:
        """Start a program that writes its arguments and environment, and ends."""
        record = self.folder / "record.json"
        program = write_program(
            self.folder / "a program",
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"content = [sys.argv[1:], dict(os.environ), os.getcwd()]\n"
            f"json.dump(content, open({str(record)!r}, 'w'))\n",
        )
        engine = self.engine(f"{shlex.quote(str(program))} {command}", devices, **options)
        with pytest.raises(EngineError, match="exited with status 0 during its start"):
            engine.start()
        return json.loads(record.read_text(encoding="utf-8"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for engine in made.made:
        engine.close()


# --- what it gets --------------------------------------------------------------------------------


def test_every_placeholder_has_its_value(site: Site) -> None:
    command = "{model} -p{port} {host} {slots} {context} {gpus} {log} {socket} '{model} x' {{port}}"
    argv, _, _ = site.recorded(
        command, ("2", "3"), model="a model: $(x) {port}", slots=7, context_length=512
    )
    port = argv[1].removeprefix("-p")
    assert 0 < int(port) < 65536
    assert argv == [
        "a model: $(x) {port}", f"-p{port}", "127.0.0.1", "7", "512", "2", str(site.log),
        str(site.home / "engine.sock"), "a model: $(x) {port} x", "{port}",
    ]  # fmt: skip


def test_without_gpus_one_can_be_divided_by(site: Site) -> None:
    argv, _, _ = site.recorded("{port} {gpus} {slots}")
    assert argv[1] == "1"
    assert 1 <= int(argv[2]) <= 4


def test_a_server_gets_the_job_s_environment_and_its_own_gpus(site: Site) -> None:
    site.environ |= {"SITE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "ROCR_VISIBLE_DEVICES": "0,1"}
    site.environ |= {"AIFLUX_API_KEY": "secret", "HOME": "/my/home", "PYTHONPATH": "/worker"}
    site.environ |= {"AIFLUX_JOB_PYTHONPATH": "/module", "AIFLUX_JOB_LD_PRELOAD": ""}
    site.environ |= {"AIFLUX_JOB_DIR": str(site.folder)}
    _, environment, folder = site.recorded("{port}", ("2",), engine_env={"SITE": "2"})
    assert (environment["SITE"], environment["HOME"]) == ("2", "/my/home")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert "ROCR_VISIBLE_DEVICES" not in environment
    assert environment["PYTHONPATH"] == "/module"
    assert {name for name in environment if name.startswith("AIFLUX_")} == {"AIFLUX_SERVER"}
    assert folder == str(site.folder)


def test_a_server_on_amd_s_gpus_gets_their_variable(site: Site) -> None:
    site.environ |= {"AIFLUX_GPU_VENDOR": "amd", "ROCR_VISIBLE_DEVICES": "0,1,2,3"}
    site.environ |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    _, environment, _ = site.recorded("{port}", ("2", "3"))
    assert environment["ROCR_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_a_socket_is_in_a_private_folder_whose_path_is_short(site: Site) -> None:
    site.home = site.folder / ("long" * 20) / "home"
    engine = site.engine(SOCKET)
    engine.start()
    path = Path(engine.client.base_url.removeprefix("unix:"))
    assert len(os.fsencode(path)) <= 107
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    engine.start()  # the socket of the first server is in the way
    engine.close()
    assert not path.parent.exists()


# --- how it fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "what"),
    [("no-such-server", "no no-such-server on PATH on "),
     ("/no/such", "/no/such is not an executable file on ")],
)  # fmt: skip
def test_a_missing_program_is_named_with_the_remedy(site: Site, program: str, what: str) -> None:
    with pytest.raises(EngineError, match=what) as caught:
        site.engine(f"{program} {{port}}")
    assert "--modules NAME" in str(caught.value.remedy)


def test_the_program_is_looked_for_on_the_path_of_the_job(site: Site) -> None:
    (site.folder / "serve-it").symlink_to("/bin/true")
    site.environ["PATH"] = str(site.folder)
    with pytest.raises(EngineError, match=r"serve-it.* exited with status 0"):
        site.engine("serve-it {port}").start()


def test_the_end_of_the_log_is_in_the_error(site: Site) -> None:
    engine = site.engine("sh -c 'echo CUDA out of memory; exit 3' {port}")
    with pytest.raises(EngineError, match=r"exited with status 3.*\nCUDA out of memory") as caught:
        engine.start()
    assert str(site.log) in str(caught.value.remedy)


def test_a_server_that_never_gets_ready_is_ended(site: Site) -> None:
    (site.folder / "loading").touch()
    loading = shlex.quote(str(site.folder / "loading"))
    engine = site.engine(f"{PORT} --loading {loading}", load_timeout=1.5)
    with pytest.raises(EngineError, match=r"within 1\.5 s: it listens.*\nlistening") as caught:
        engine.start()
    assert "--load-timeout" in str(caught.value.remedy)
    assert not engine.is_ready()


def test_a_server_that_others_can_reach_is_refused(site: Site) -> None:
    engine = site.engine(f"{PORT} --host 0.0.0.0")
    with pytest.raises(RejectedError, match="listens on every address") as caught:
        engine.start()
    assert "--host {host}" in str(caught.value.remedy)
    assert not engine.is_ready()


def test_a_server_on_another_port_is_not_found(site: Site) -> None:
    engine = site.engine(PORT.replace("{port}", "0 --ignored {port}"), load_timeout=1.0)
    with pytest.raises(EngineError, match=r"within 1 s: it does not listen on http://127\.0\.0\.1"):
        engine.start()


def test_a_server_without_its_socket_is_not_found(site: Site) -> None:
    engine = site.engine(PORT.replace("{port}", "0 --ignored {socket}"), load_timeout=1.0)
    with pytest.raises(EngineError, match=r"within 1 s: it does not listen on .*engine\.sock"):
        engine.start()


def test_a_server_that_goes_into_the_background_is_named_with_the_remedy(site: Site) -> None:
    engine = site.engine("sh -c 'sleep 30 & exit 0' {port}")
    with pytest.raises(
        EngineError, match=r"status 0 during its start:\nits log is empty"
    ) as caught:
        engine.start()
    assert "must stay in the foreground" in str(caught.value.remedy)


def test_a_started_server_is_described(site: Site) -> None:
    (site.folder / "serve").symlink_to(sys.executable)
    command = PORT.replace(shlex.quote(sys.executable), shlex.quote(str(site.folder / "serve")))
    engine = site.engine(command, ("0", "1"), slots=8)
    engine.start()
    assert engine.describe() == "engine 0 is up: serve, GPU 0,1, 8 slots"
    site.engine(command).start()
    assert site.made[-1].describe() == "engine 0 is up: serve, no GPU"
    assert site.made[-1].max_in_flight() is None


def test_a_llama_server_gets_as_many_requests_as_it_has_threads(site: Site) -> None:
    """With its default, the threads are two more than the slots."""
    gguf = site.folder / "m.gguf"
    gguf.write_bytes(make_tiny_gguf.tiny())
    tool = shlex.join([sys.executable, str(SERVER.with_name("fake_llama_server.py"))])
    engine = site.engine(f"{tool} -m {gguf} --alias m --host {{host}} --port {{port}} -np 64 -c 64")
    engine.start()
    assert engine.max_in_flight() == 66
    engine.stop()
    other = site.engine(PORT, slots=64)
    other.start()
    assert other.max_in_flight() == 80


def test_a_server_that_is_too_busy_for_a_probe_is_ready(site: Site) -> None:
    engine = site.engine(PORT)
    engine.start()
    assert engine.is_ready()
    (pid,) = [pid for pid in sessions() if started_by(pid, site)]
    os.kill(pid, signal.SIGSTOP)  # the kernel still accepts connections
    try:
        assert engine.is_ready()
    finally:
        os.kill(pid, signal.SIGCONT)


def started_by(pid: int, site: Site) -> bool:
    try:
        return (
            str(SERVER).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            and str(site.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()
        )
    except OSError:
        return False


# --- a run ---------------------------------------------------------------------------------------


def working(folder: Path, command: str, **options: Any) -> Working:
    return Working(folder, None, engine_command=command, model="m:1", **options)


@pytest.mark.parametrize("fault", ["die", "deaf"])
@pytest.mark.parametrize("command", [PORT, SOCKET])
def test_a_server_that_crashes_or_turns_deaf_is_restarted(
    tmp_path: Path, fault: str, command: str
) -> None:
    once = f"{command} --once {shlex.quote(str(tmp_path))}"
    run = working(tmp_path, once).prompts("a", "b", f"{fault} now", "c")
    assert run.run() == ExitCode.OK, run.error
    assert len(run.results) == 4
    assert any("restarting it" in text for text in run.reporter.messages)
    (facts,) = run.status["aiflux"]["engines"]
    assert facts["command"] == once
    assert run.status["aiflux"]["sealed"] is False
    until(lambda: not any(str(tmp_path) in text for text in commands()))


def commands() -> list[str]:
    """Return the command lines of all running stand-ins."""
    found = []
    for pid in sessions():
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if str(SERVER) in text:
            found.append(text)
    return found


def test_each_group_of_gpus_has_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    prompts = [f"p{index}" for index in range(24)]
    run = working(tmp_path, f"{PORT} --delay 0.1", gpus_per_engine=2, concurrency=2)
    assert run.prompts(*prompts).run() == ExitCode.OK, run.error
    engines = run.status["aiflux"]["engines"]
    assert [each["devices"] for each in engines] == [["0", "1"], ["2", "3"]]
    assert {each["metadata"]["engine"] for each in run.results} == {0, 1}


def test_the_results_name_the_model_that_answered(tmp_path: Path) -> None:
    run = working(tmp_path, PORT.replace("{model}", "/models/m:1")).prompts("a")
    assert run.run() == ExitCode.OK, run.error
    (result,) = run.results
    assert result["metadata"]["model"] == "m:1"
    assert any("does not list the model 'm:1'" in text for text in run.reporter.messages)


# --- the plan ------------------------------------------------------------------------------------


def test_another_command_is_another_run(tmp_path: Path) -> None:
    run = working(tmp_path, PORT).prompts("a", "400")
    assert run.run() == ExitCode.FAILURES
    same = PORT.replace(" --port", "   --port")
    assert Site(tmp_path).plan(PORT).id == Site(tmp_path).plan(same).id
    assert Site(tmp_path).plan(PORT).id != Site(tmp_path).plan(f"{PORT} --delay 0").id
    run.prompts("a", "400")
    run.options |= {"engine_command": f"{PORT} --delay 0", "retry_failed": True}
    assert run.run() == ExitCode.USAGE
    assert isinstance(run.error, RunConflictError)
    assert f"engine command ({PORT})" in run.error.message
    assert "--force-resume" in str(run.error.remedy)
    assert run.run(force=True, force_resume=True) == ExitCode.FAILURES, run.error


def test_a_digest_is_refused_as_no_server_reports_it(site: Site) -> None:
    with pytest.raises(ConfigError, match="the server of --engine-command does not report"):
        site.plan(PORT, model="m:1@sha256:0123456789ab")


def test_models_of_the_input_run_one_after_the_other(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    lines = [request_line(name, body={"model": name, "messages": messages})
             for name in ("one", "two")]  # fmt: skip
    run = working(tmp_path, PORT)
    run.options["model"] = None
    run.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run.run() == ExitCode.OK, run.error
    assert [each["metadata"]["model"] for each in run.results] == ["one", "two"]
    options = RunOptions(engine_command=PORT)
    draft = draft_run(run.input, tmp_path / "o.json", options, tmp_path / "models", KIND)
    assert (draft.plan.models, draft.plan.models_dir) == (("one", "two"), None)


def test_keys_in_a_command_are_not_in_the_report() -> None:
    shown = without_secrets("vllm serve m --api-key s3cret --max-num-batched-tokens 8192 --key=abc")
    assert shown == (
        "vllm serve m --api-key (not shown) --max-num-batched-tokens 8192 --key=(not shown)"
    )
