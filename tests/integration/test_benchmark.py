"""``aiflux benchmark`` with real engines: in jobs, and on this machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.process import free_port
from tests.integration.conftest import MODEL, Cluster, User

MEASURE = ["benchmark", "--mix", "classify", "--requests", "6", "--concurrency", "1,2",
           "--model", MODEL]  # fmt: skip


def record(place: Path) -> dict[str, Any]:
    path = place / "classify.benchmark" / "benchmark.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_settings_are_measured_in_jobs(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    measure = [aiflux, *MEASURE, "--mem", "2G", "--image", image, "--slots", "2"]
    shown = user.run(*measure, "--wait", "--write-config", "aiflux.yaml", cwd=place, env=job_env,
                     timeout=400)  # fmt: skip
    assert "recommended: ollama-s2-c" in shown
    user.run(*measure, cwd=place, env=job_env)  # nothing is measured again
    found = record(place)
    assert found["complete"]
    assert found["where"] == "slurm"
    assert [point["concurrency"] for point in found["points"]] == [1, 2]
    for point in found["points"]:
        figures = point["figures"]
        assert figures["failed"] == 0
        assert figures["slots"] == 2
        assert 20 < figures["prompt_tokens"] < 120
        assert figures["answer_tokens"] == 1
        assert 0 < figures["p50"] <= figures["p99"]
    assert "slots: 2" in (place / "aiflux.yaml").read_text(encoding="utf-8")
    settings = json.loads(user.run(aiflux, "config", "show", "--json", cwd=place))
    assert settings["settings"]["slots"]["value"] == 2


def test_engines_are_measured_on_this_machine(
    user: User, aiflux: Path, ollama: Path, llama_server: Path, models: Path, place: Path
) -> None:
    settings = [f"AIFLUX_OLLAMA={ollama}", f"AIFLUX_MODELS_DIR={models}", "AIFLUX_ENGINE=llamacpp",
                f"AIFLUX_ENGINE_PROGRAM={llama_server}"]  # fmt: skip
    engines = ["--engine", "ollama,llamacpp", "--slots", "1,2", "--local"]
    user.run("env", *settings, aiflux, *MEASURE, *engines, cwd=place, timeout=400)
    found = record(place)
    names = [(point["series"]["engine"], point["figures"]["slots"]) for point in found["points"]]
    assert names == [
        (engine, slots) for engine in ("ollama", "llamacpp") for slots in (1, 2) for _ in "12"
    ]
    assert all(point["figures"]["tokens_per_second"] > 0 for point in found["points"])
    assert len(found["knees"]) == 4
    assert user.none_left(), user.processes()


def compared(place: Path) -> dict[str, Any]:
    """Return the only point of a benchmark, whose throughput the engine's own tool measured too."""
    (point,) = record(place)["points"]
    found: dict[str, Any] = point["compared"]
    assert found.get("error") is None, found
    assert found["tokens_per_second"] > 0
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_vllms_own_tools_measure_the_same_point(
    user: User, aiflux: Path, vllm: Path, hub_model: Path, place: Path
) -> None:
    """``vllm bench throughput`` with the model, and ``vllm bench serve`` at a running server."""
    env = {"AIFLUX_ENGINE_PROGRAM": str(vllm), "AIFLUX_ENGINE": "vllm",
           "PATH": f"{vllm.parent}:{user.environment()['PATH']}"}  # fmt: skip
    small = ["--mix", "classify", "--requests", "4", "--concurrency", "2", "--model", hub_model]
    user.run(aiflux, "benchmark", *small, "--local", "--against", "--context-length", "512",
             cwd=place, env=env, timeout=900)  # fmt: skip
    assert compared(place)["tool"] == "vllm bench throughput"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = [vllm, "serve", hub_model, "--host", "127.0.0.1", "--port", str(port),
             "--max-num-seqs", "2", "--max-model-len", "512", "--enforce-eager"]  # fmt: skip
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            user.command(serve), cwd=place, stdout=log, stderr=subprocess.STDOUT,
            env=user.environment({"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}),
        )  # fmt: skip
    try:
        user.run(aiflux, "benchmark", *small, "--engine-url", url, "--engine-wait", "400",
                 "--again", "--against", cwd=place, env=env, timeout=900)  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    assert compared(place)["tool"] == "vllm bench serve"


def test_llama_cpps_own_tool_measures_the_same_point(
    user: User, aiflux: Path, llama_server: Path, models: Path, tiny: str, place: Path
) -> None:
    env = {"AIFLUX_ENGINE_PROGRAM": str(llama_server), "AIFLUX_ENGINE": "llamacpp",
           "AIFLUX_MODELS_DIR": str(models)}  # fmt: skip
    user.run(aiflux, "benchmark", "--mix", "classify", "--requests", "8", "--concurrency", "2",
             "--slots", "2", "--model", tiny, "--local", "--against",
             cwd=place, env=env)  # fmt: skip
    assert compared(place)["tool"] == "llama-batched-bench"
