"""A model over both nodes of the cluster: real Slurm, srun, Apptainer and vLLM on the CPU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.conftest import (
    Cluster,
    User,
    lines,
    recorded,
    request,
    shard_status,
    until,
)
from tests.integration.test_jobs import submitted
from tests.tools.make_tiny_snapshot import put_tiny

REQUESTS = 60
NUMA = Path("/usr/lib/x86_64-linux-gnu/libnuma.so.1")


@pytest.fixture(scope="session")
def eight_heads(user: User) -> Path:
    """A random model with 8 heads, which two nodes can divide."""
    model = put_tiny(user.folder("eight heads"), 8)
    user.give(model)
    return model


@pytest.fixture
def nodes_env(vllm: Path, image: Path, user: User) -> dict[str, str]:
    """The environment of jobs that use the vLLM of the test stack in the container.

    The image with vLLM takes minutes to build; this one is built anyway.
    """
    return {
        "AIFLUX_IMAGE": str(image),
        "AIFLUX_MODELS_DIR": str(user.folder("models-of-the-hub")),
        "AIFLUX_ALLOW_CPU": "1",
        "APPTAINER_BIND": f"{vllm.parents[1]}:{vllm.parents[1]}:ro,{NUMA}:{NUMA}:ro",
        "APPTAINERENV_AIFLUX_ENGINE_PROGRAM": str(vllm),
        "APPTAINERENV_AIFLUX_ENGINE": "vllm",
    }


def submit(user: User, checkout: Path, place: Path, env: dict[str, str], model: Path) -> str:
    """Submit a run with a vLLM over both nodes, and return the job's id."""
    prompts = [request(f"r{at}", f"Count from {at} on.", model=None, max_tokens=48,
                       ignore_eos=True) for at in range(REQUESTS)]  # fmt: skip
    user.write(place / "in.jsonl", lines(*prompts))
    return submitted(user.run(
        checkout / ".venv/bin/aiflux", "run", "--engine", "vllm", "--nodes-per-engine", "2",
        "--model", model, "--input", "in.jsonl", "--output", "out.json", "--gpus-per-node", "0",
        "--mem", "6G", "--cpus-per-task", "1", "--slots", "4", "--context-length", "512",
        "--engine-env", "OMP_NUM_THREADS=1", "--no-preflight", cwd=place, env=env,
    ))  # fmt: skip


def headless_ranks(user: User) -> list[int]:
    """Return the processes of `vllm serve` on nodes other than the first."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes().split(b"\0")
            mine = proc.owner() == user.name
        except (OSError, KeyError):
            continue
        if mine and b"--headless" in words and b"serve" in words:
            found.append(int(proc.name))
    return found


def test_a_run_over_two_nodes_survives_the_death_of_a_rank(
    user: User, checkout: Path, cluster: Cluster, place: Path, nodes_env: dict[str, str],
    eight_heads: Path,
) -> None:  # fmt: skip
    """vLLM itself does not notice it before the next request, and its other ranks stay."""
    job = submit(user, checkout, place, nodes_env, eight_heads)
    until(lambda: recorded(place) > 4, "5 results", 400)
    assert cluster.fields(job)["NodeList"] == "n[1-2]"
    (rank,) = headless_ranks(user)
    os.kill(rank, signal.SIGKILL)
    end = cluster.end(job, timeout=600)
    log = cluster.log(job, place)
    assert end.code == 0, log
    # Who notices it first, the rank's watch or a request in flight, is not certain.
    assert "engine 0 is down; restarting it (1)" in log
    assert "engine 0 is up on the CPU of n1 and n2: vLLM" in log
    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    choices = [entry["output"]["choices"][0] for entry in entries]
    assert [each["finish_reason"] for each in choices] == ["length"] * REQUESTS
    status = shard_status(place)["aiflux"]
    assert (status["sealed"], status["engines"][0]["nodes"]) == (False, ["n1", "n2"])
    assert "the ranks of the engine use the network" in status["unsealed"]
    assert headless_ranks(user) == []
    assert user.none_left(), user.processes()
