"""Engines on several nodes before submission: what is refused, and what is asked of Slurm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Progress
from aiflux.engines.sizing import slots
from aiflux.engines.vllm.kind import KIND
from aiflux.engines.vllm.safetensors import architecture_of
from aiflux.models.catalog import read_catalog
from aiflux.models.figures import Figures
from aiflux.slurm.cluster import ask_cluster
from aiflux.slurm.preflight.cluster import cluster_checks
from aiflux.slurm.preflight.local import collect
from aiflux.slurm.preflight.nodes import Room, check_division, check_memory
from aiflux.slurm.script import render
from aiflux.slurm.submit import plan_resume
from aiflux.worker.main import main as worker
from aiflux.worker.stats import Ledger
from tests.tools.make_sif import make_sif
from tests.unit.engines.test_vllm import BIG, SEVENTY, plan_of
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.fake_site import FakeSite, node, partition
from tests.unit.helpers import write_input
from tests.unit.made_snapshots import LLAMA, put_snapshot
from tests.unit.slurm.test_script import SHELLCHECK, job

GB = 10**9


@pytest.fixture
def aiflux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `aiflux run` in a folder with an input, an image and a model."""
    waiting_slurm(tmp_path / "bin", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(tmp_path / "models"))
    write_input(tmp_path / "in.jsonl", 9, body={"messages": [{"role": "user", "content": "x"}]})
    make_sif(tmp_path / "aiflux-vllm.sif", version="1", engine="vllm", cpu_only="yes")
    put_snapshot(tmp_path / "models" / "hub", "org/tiny")

    def run(*words: str) -> int:
        return main(["run", "--engine", "vllm", "--model", "hf:org/tiny", "--input", "in.jsonl",
                     "--output", "out.json", "--gpus-per-node", "0", *words])  # fmt: skip

    return run


def test_the_job_asks_for_the_nodes_and_a_resumed_one_too(
    aiflux: Callable[..., int], tmp_path: Path
) -> None:
    assert aiflux("--nodes-per-engine", "2", "--shards", "3") == 0
    run = RunDirectory.of_output(tmp_path / "out.json")
    for script in (run.script.read_text(), plan_resume_text(run)):
        for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks=2", "#SBATCH --ntasks-per-node=1",
                     "#SBATCH --array=0-2", "nodes=2"):  # fmt: skip
            assert line in script.splitlines()
    assert read_plan(run).options.nodes_per_engine == 2


def plan_resume_text(run: RunDirectory) -> str:
    fresh = run.submissions.read_text().replace('"100"', '"1"')
    run.submissions.write_text(fresh)
    return plan_resume(run, {}).script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ollama", "--model", "m:1"], "the engine ollama uses one node only"),
        (["--engine", "llamacpp", "--model", "m:1"], "the engine llamacpp uses one node only"),
        (["--gpus-per-engine", "2"], "an engine on several nodes uses all GPUs of each"),
        (["--local"], "only a job that `aiflux run` submits has several nodes"),
        (["--seal"], "a run with --nodes-per-engine cannot be sealed"),
        (["--nodes-per-engine", "3"], "vLLM cannot divide org/tiny among 3 nodes"),
    ],
)
def test_what_cannot_use_several_nodes_is_refused_and_nothing_is_written(
    aiflux: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    assert aiflux("--nodes-per-engine", "2", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json.aiflux").exists()


def test_a_worker_started_by_hand_has_one_node(
    aiflux: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIFLUX_NODES_PER_ENGINE", "2")
    assert worker(["in.jsonl", "--engine", "vllm", "--model", "hf:org/tiny"]) == 2
    assert "only a job that `aiflux run` submits has several nodes" in capsys.readouterr().err


def test_the_script_passes_shellcheck(tmp_path: Path) -> None:
    if not SHELLCHECK.exists():
        pytest.skip("shellcheck is not installed next to this Python")
    script = tmp_path / "run.sbatch"
    script.write_text(render(job(nodes=4)), encoding="utf-8")
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("changes", "states", "level", "what"),
    [
        ({}, ["IDLE"] * 3, "", ""),
        ({}, ["IDLE"] * 2, "error", "--nodes-per-engine 3 is more than partition gpu has"),
        ({"MaxNodes": "2"}, ["IDLE"] * 3, "error", "for a job like this (2)"),
        ({"MaxNodes": "UNLIMITED"}, ["IDLE", "DOWN", "IDLE"], "warning", "fewer than 3 nodes"),
    ],
)
def test_a_partition_needs_enough_nodes(
    tmp_path: Path, changes: dict[str, str], states: list[str], level: str, what: str
) -> None:
    nodes = [node(f"g{at}", Gres="gpu:2", State=state) for at, state in enumerate(states)]
    small = node("small", Gres="gpu:1")
    site = FakeSite(partitions=[partition("gpu", **changes)], nodes=[*nodes, small])
    facts = ask_cluster(site.install(FakeCommands(tmp_path / "fakes")))
    slurm = SlurmConfig(partition="gpu", gpus_per_node="2").checked()
    found = collect(cluster_checks(facts, slurm, 3))
    assert [finding.level for finding in found] == [level] * bool(level)
    assert all(what in finding.what for finding in found)


@pytest.mark.parametrize(
    ("nodes", "gpus", "message", "fix"),
    [
        (2, 0, "", ""),
        (4, 2, "", ""),
        (3, 0, "among 3 nodes: it has 8 attention heads", "--nodes-per-engine 1 or 2"),
        (5, 1, "among 5 GPUs", "--nodes-per-engine 1 or 2 or 4"),
        (2, 3, "among 6 GPUs", "--gpus-per-node"),
    ],
)
def test_all_gpus_together_must_divide_the_model(
    tmp_path: Path, nodes: int, gpus: int, message: str, fix: str
) -> None:
    put_snapshot(tmp_path / "models" / "hub", "org/tiny")
    plan = plan_of(tmp_path, nodes_per_engine=nodes)
    found = [*check_division(plan, read_catalog(), gpus)]
    assert len(found) == bool(message)
    assert all(message in finding.what and fix in finding.fix for finding in found)


def test_the_memory_of_all_nodes_counts(tmp_path: Path) -> None:
    put = put_snapshot(tmp_path / "models" / "hub", "org/tiny")
    put_large(put)
    room = Room("l40s", 48 * GB, 2, 2, "--gpus-per-node {}")

    def found(nodes: int) -> list[str]:
        plan = plan_of(tmp_path, context_length=4096, nodes_per_engine=nodes)
        return [f"{each.what} {each.fix}" for each in check_memory(plan, read_catalog(), room)]

    (alone,) = found(1)
    assert "; --nodes-per-engine 2 --gpus-per-node 2, without --gpus-per-engine" in alone
    assert found(2) == []
    unknown = Room("l40s", 48 * GB, 1, 0, "--gpus-per-node l40s:{}")  # no node is known
    plan = plan_of(tmp_path, context_length=4096)
    (finding,) = check_memory(plan, read_catalog(), unknown)
    assert "are enough: --gpus-per-engine 4 --gpus-per-node l40s:4" in finding.fix
    mig = Room("h100_1g.10gb", 10 * GB, 2, 7, "--gpus-per-node {}")
    plan = plan_of(tmp_path, nodes_per_engine=2)
    (finding,) = check_memory(plan, read_catalog(), mig)
    assert "slices of GPUs (h100_1g.10gb) cannot work together" in finding.what


def put_large(folder: Path) -> None:
    """Replace a snapshot by one with the headers of a model of 70 billion parameters."""
    (folder / "config.json").write_text(json.dumps(BIG), encoding="utf-8")
    size = SEVENTY.layers[0]
    weights = {f"model.layers.{at}.w": {"dtype": "BF16", "shape": [1],
               "data_offsets": [at * size, (at + 1) * size]} for at in range(80)}  # fmt: skip
    text = json.dumps(weights).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 80 * size)


def test_slots_follow_from_the_memory_of_all_nodes(tmp_path: Path) -> None:
    shape = {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8}  # fmt: skip
    figures = Figures(architecture_of(shape), (16_060_522_496 // 32,) * 32, 0)
    plan = plan_of(tmp_path, copies=1000, context_length=4096)
    one = slots(KIND, plan, ("0",), 2, figures, (24 * GB,))
    assert slots(KIND, plan, ("0",), 2, figures, (24 * GB,) * 2) > 4 * one


def test_gpu_hours_are_those_of_all_nodes(tmp_path: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    plan = plan_of(tmp_path, nodes_per_engine=3)
    totals = Ledger.of(plan, None, environ).totals(Progress(elapsed_seconds=10.0))
    assert totals.gpu_seconds == 60.0
    assert RunOptions().nodes_per_engine == 1
