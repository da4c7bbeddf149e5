"""`aiflux serve` as a job: what is refused, the files, the script, and what Slurm says of it."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.serve_directory import (
    ServeDirectory,
    ServeSettings,
    ServeState,
    served_directories,
)
from aiflux.engines.sizing import context_length
from aiflux.errors import AifluxError, ConfigError, RunConflictError, UsageError
from aiflux.slurm import SlurmRunner
from aiflux.slurm.serve import (
    default_name,
    make_certificate,
    node_addresses,
    plan_serve,
    serve_options,
    stop,
    submit_serve,
    view_of,
)
from tests.tools import make_tiny_gguf
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import write_input
from tests.unit.made_models import put_model

NODES = """\
NodeName=n1 NodeAddr=127.0.0.1 State=IDLE Partitions=gpu CPUTot=8 RealMemory=16000
NodeName=n2 NodeAddr=localhost State=IDLE Partitions=gpu,big CPUTot=8 RealMemory=16000
NodeName=n3 NodeAddr=no-such-host.invalid State=DOWN Partitions=gpu CPUTot=8 RealMemory=16000
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = waiting_slurm(tmp_path / "bin", monkeypatch)
    fakes.add("scontrol", f"case \"$*\" in *config*) echo 'ClusterName = c' ;; *node*) "
              f"printf %b {json.dumps(NODES)} ;; esac\n")  # fmt: skip
    make_sif(tmp_path / "aiflux-llamacpp.sif", version="1", cpu_only="yes", engine="llamacpp")
    put_model(tmp_path / "models", "tiny:latest", make_tiny_gguf.tiny())
    monkeypatch.chdir(tmp_path)
    return fakes


def config_of(**arguments: Any) -> Config:
    given = {"model": "tiny", "models_dir": "models", "gpus_per_node": "0", **arguments}
    return Config(arguments={name: value for name, value in given.items() if value is not None})


def served(name: str = "tiny", *, tunnel: bool = False, **arguments: Any) -> ServeDirectory:
    """Submit a served engine; return its directory."""
    config = config_of(**arguments)
    directory = ServeDirectory.named(name, os.environ)
    slurm = config.get_slurm_config()
    options = serve_options(config, slurm)
    planned = plan_serve(config, slurm, directory, options, idle_seconds=60, tunnel=tunnel,
                         check=False)  # fmt: skip
    submit_serve(directory, planned)
    return directory


def answers(fakes: FakeCommands, state: str, node: str = "n1", reason: str = "None") -> None:
    """Let squeue know the job."""
    fakes.say("squeue", f"100|N/A|{state}|N/A|1:00|{node}|{reason}\n")


def test_the_job_and_its_files(slurm: FakeCommands, tmp_path: Path) -> None:
    directory = served(time="01:00:00")
    script = directory.run.script.read_text(encoding="utf-8")
    assert "#SBATCH --job-name=aiflux-serve-tiny\n" in script
    assert "#SBATCH --time=01:00:00\n" in script
    assert "\nwant_seal=0\n" in script
    assert directory.read_key() not in script
    assert json.loads(directory.settings.read_text()) == {
        "idle_seconds": 60, "addresses": {"n1": "127.0.0.1", "n2": "127.0.0.1"},
    }  # fmt: skip
    for path in (directory.key, directory.header, directory.certificate_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert directory.header.read_text() == f"Authorization: Bearer {directory.read_key()}\n"
    assert len(directory.read_key()) >= 43, "256 bits"
    assert [each.name for each in served_directories(os.environ)] == ["tiny"]
    (call,) = slurm.calls("sbatch")
    assert directory.read_key() not in " ".join([*call.argv, *call.environ.values()])


def test_the_engine_is_sized_for_conversations(slurm: FakeCommands) -> None:
    plan = read_plan(served().run)
    assert context_length(plan, 131072) == 8192
    assert context_length(plan, 2048) == 2048
    assert plan.requests >= 256, "as many as the largest number of slots"
    plan = read_plan(served("other", context_length="4096").run)
    assert context_length(plan, 131072) == 4096


def test_loopback_only_needs_no_addresses(slurm: FakeCommands) -> None:
    assert served(tunnel=True).read_settings() == ServeSettings(60, None)


def test_addresses_are_those_of_the_possible_nodes(slurm: FakeCommands) -> None:
    assert node_addresses(SlurmConfig(partition="big")) == {"n2": "127.0.0.1"}
    assert {*node_addresses(SlurmConfig())} == {"n1", "n2"}


@pytest.mark.parametrize(
    ("arguments", "kind", "gpus"),
    [
        ({}, "llamacpp", 1),
        ({"model": "hf:org/name"}, "vllm", 1),
        ({"model": "./folder"}, "vllm", 1),
        ({"engine": "vllm", "model": "hf:a/b", "gpus_per_node": "a100:4"}, "vllm", 4),
        ({"gpus_per_node": "4", "gpus_per_engine": "2"}, "llamacpp", 2),
    ],
)
def test_the_kind_follows_from_the_model_and_gets_all_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, str],
    kind: str,
    gpus: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    config = config_of(**arguments)
    options = serve_options(config, config.get_slurm_config())
    assert (options.engine, options.gpus_per_engine) == (kind, gpus)


@pytest.mark.parametrize(
    ("arguments", "seen", "remedy"),
    [
        ({"engine": "ollama"}, "cannot require a key", "--engine llamacpp"),
        ({"engine_command": "x --port {port}"}, "cannot require a key", "--engine vllm"),
        ({"engine_url": "http://h:1"}, "engine_url is set (argument)", "unset"),
        ({"engine": "vllm", "nodes_per_engine": "2"}, "uses one node", "at 1"),
        ({"model": None}, "no model is named", "--model"),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: dict[str, Any], seen: str, remedy: str
) -> None:
    config = config_of(**arguments)
    with pytest.raises(ConfigError) as caught:
        serve_options(config, config.get_slurm_config())
    assert seen in caught.value.message
    assert remedy in (caught.value.remedy or "")


def test_a_seal_that_somebody_asked_for_is_refused(slurm: FakeCommands) -> None:
    with pytest.raises(ConfigError, match="cannot be sealed"):
        served(seal=True)
    assert not served_directories(os.environ)


def test_a_name_is_taken_while_its_job_is_there(slurm: FakeCommands) -> None:
    first = served().read_key()
    with pytest.raises(RunConflictError, match="taken: its engine is pending") as caught:
        served()
    assert "aiflux serve stop tiny" in (caught.value.remedy or "")
    answers(slurm, "CANCELLED")
    assert served().read_key() != first


def test_a_job_that_is_refused_leaves_a_name_that_can_be_used(slurm: FakeCommands) -> None:
    slurm.say("sbatch", stderr="sbatch: error: invalid partition", status=1)
    with pytest.raises(AifluxError, match="sbatch refused"):
        served()
    assert not served_directories(os.environ)
    slurm.say("sbatch", "100\n")
    served()


def test_a_job_cannot_use_a_served_engine(slurm: FakeCommands, tmp_path: Path) -> None:
    """Its container does not see the engine's key."""
    write_input(tmp_path / "in.jsonl", 1)
    with pytest.raises(ConfigError, match="a job cannot use serve:tiny"):
        SlurmRunner(workspace=tmp_path).run("in.jsonl", "out.json", engine_url="serve:tiny")


def test_a_mistake_leaves_nothing(slurm: FakeCommands, tmp_path: Path) -> None:
    (tmp_path / "aiflux-llamacpp.sif").unlink()
    with pytest.raises(UsageError):
        served()
    assert not served_directories(os.environ)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama3.2:3b", "llama3.2-3b"),
        ("hf:Org/Name-7B@main", "name-7b"),
        ("/models/My Model.gguf", "my-model"),
        ("http://host/library/m:1", "m-1"),
        ("::", "engine"),
        ("x" * 60, "x" * 40),
    ],
)
def test_names_follow_from_models(model: str, name: str) -> None:
    assert default_name(model) == name
    ServeDirectory.named(default_name(model), os.environ)


def test_openssl_reads_the_certificate(slurm: FakeCommands) -> None:
    directory = served()
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", directory.certificate],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "DNS:localhost, IP Address:127.0.0.1" in text
    assert "CA:FALSE" in text
    ssl.create_default_context().load_verify_locations(directory.certificate)


def test_a_certificate_holds_many_nodes(tmp_path: Path) -> None:
    directory = ServeDirectory(tmp_path)
    many = [f"10.{one}.{two}.9" for one in range(8) for two in range(250)]
    make_certificate(directory, many)
    # OpenSSL accepts 100 KB of certificates from a server (SSL_MAX_CERT_LIST_DEFAULT).
    assert directory.certificate.stat().st_size < 50_000


def test_a_missing_or_broken_openssl_is_reported(tmp_path: Path) -> None:
    directory = ServeDirectory(tmp_path)
    with pytest.raises(ConfigError, match="no openssl on PATH"):
        make_certificate(directory, [], {"PATH": str(tmp_path)})
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("openssl", stderr="line one\nunknown option\n", status=1)
    with pytest.raises(ConfigError, match="made no certificate: unknown option"):
        make_certificate(directory, [], {"PATH": fakes.path})


READY = ServeState("ready", job="100", node="n1", host="127.0.0.1", port=1)


@pytest.mark.parametrize(
    ("state", "job", "phase", "why"),
    [
        (None, ("PENDING", "", "Resources"), "pending", "Resources"),
        (None, ("PENDING",), "pending", ""),
        (READY, ("PENDING", "", "BeginTime"), "pending", "BeginTime, again after a requeue"),
        (None, ("RUNNING",), "starting", ""),
        (READY, ("RUNNING",), "ready", ""),
        (READY, ("RUNNING", "n2"), "starting", ""),
        (replace(READY, job="99"), ("RUNNING",), "starting", ""),
        (ServeState("starting", node="n1"), ("RUNNING",), "starting", ""),
        (ServeState("ended", node="n1", reason="signal"), ("RUNNING",), "starting", ""),
        (ServeState("ended", node="n1", reason="idle"), ("RUNNING",), "ended", "idle"),
        (ServeState("ended", reason="idle"), ("COMPLETED",), "ended", "idle"),
        (ServeState("ended", reason="time limit"), ("COMPLETED",), "ended", "time limit"),
        (ServeState("ended", reason="crashed", message="no GPU"), ("FAILED",), "ended",
         "crashed: no GPU"),
        (ServeState("ended", reason="signal"), ("CANCELLED",), "ended", "stopped"),
        (ServeState("ended", reason="signal"), ("COMPLETING",), "pending", "its job is completing"),
        (READY, ("COMPLETING",), "pending", "its job is completing"),
        (ServeState("ended", reason="idle"), ("COMPLETING",), "ended", "idle"),
        (READY, ("CANCELLED",), "ended", "stopped"),
        (READY, ("TIMEOUT",), "ended", "time limit"),
        (READY, ("PREEMPTED",), "ended", "preempted"),
        (READY, ("NODE_FAIL",), "ended", "the node failed"),
        (None, ("FAILED",), "ended", "crashed: job failed"),
    ],
)  # fmt: skip
def test_the_state_is_that_of_the_files_and_of_slurm(
    slurm: FakeCommands, state: ServeState | None, job: tuple[str, ...], phase: str, why: str
) -> None:
    directory = served()
    if state is not None:
        directory.write_state(state)
    answers(slurm, *job)
    view = view_of(directory)
    assert (view.phase, view.why) == (phase, why)


def test_a_job_that_slurm_forgot_has_ended(slurm: FakeCommands) -> None:
    directory = served()
    slurm.say("squeue")
    assert view_of(directory).why == "Slurm no longer knows its job"
    directory.write_state(ServeState("ended", reason="idle"))
    assert view_of(directory).why == "idle"


def test_a_damaged_file_is_reported(slurm: FakeCommands) -> None:
    directory = served()
    directory.state.write_text("{")
    with pytest.raises(RunConflictError, match="is damaged"):
        view_of(directory)


def test_stop_cancels_and_then_forgets(slurm: FakeCommands) -> None:
    directory = served()
    assert stop(view_of(directory))
    assert slurm.calls("scancel")[0].argv == ["100"]
    for job in ("RUNNING", "COMPLETING", "CANCELLED"):
        answers(slurm, job)
        view = view_of(directory)
        assert (view.phase, view.why) == ("ended", "stopped")
    assert not stop(view_of(directory))
    assert not directory.path.exists()


def test_a_directory_of_others_is_refused(slurm: FakeCommands) -> None:
    root = ServeDirectory.named("tiny", os.environ).path.parent
    root.mkdir(parents=True)
    root.chmod(0o777)
    with pytest.raises(RunConflictError, match="others can write"):
        served()
    shutil.rmtree(root)
