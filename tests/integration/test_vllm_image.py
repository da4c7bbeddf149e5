"""The image with vLLM: built by an ordinary user, and run as a sealed Slurm job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import (
    STACK_DIR,
    Cluster,
    User,
    answers,
    lines,
    request,
    shard_status,
)
from tests.integration.test_command import finished, until_finished
from tests.integration.test_jobs import submitted
from tests.tools.fake_hub import FakeHub, Repo
from tests.tools.make_tiny_snapshot import put_tiny
from tests.unit.made_snapshots import COMMIT, LLAMA, WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # the image's build takes minutes


@pytest.fixture(scope="session")
def vllm_image(user: User, checkout: Path, vllm: Path) -> Path:
    user.run("make", "image", "ENGINE=vllm", "BASE=debian", cwd=checkout, timeout=1500)
    return checkout / "aiflux-vllm.sif"


def labels(user: User, image: Path) -> dict[str, str]:
    shown = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    found: dict[str, str] = shown["data"]["attributes"]["labels"]
    return found


def interfaces(pid: int) -> list[str]:
    """Return the network interfaces that a process can use."""
    rows = Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return [row.partition(":")[0].strip() for row in rows]


def engines(user: User) -> list[int]:
    """Return the processes of vLLM with a model, which have that name."""
    return [int(line.split()[0]) for line in user.processes() if "VLLM::EngineCore" in line]


def test_vllm_runs_by_hand_in_its_image(user: User, vllm_image: Path) -> None:
    shown = labels(user, vllm_image)
    assert (shown["aiflux.engine"], shown["aiflux.cpu_only"]) == ("vllm", "yes")
    place = user.folder("vllm by hand")
    user.write(place / "in.jsonl", lines(request("r", "Name a planet.", model=None)))
    user.give(put_tiny(place / "tiny"))
    user.run(
        "apptainer", "run", "--net", "--network", "none", vllm_image, "in.jsonl", "out.json",
        "--model", place / "tiny", "--context-length", "512", cwd=place,
    )  # fmt: skip
    assert answers(place / "out.json").keys() == {"r"}
    assert user.none_left(), user.processes()


def test_vllm_runs_as_a_sealed_array_that_is_requeued(
    user: User, aiflux: Path, vllm_image: Path, cluster: Cluster, place: Path
) -> None:
    prompts = [request(f"r{at}", "Name planets.", model=None, max_tokens=64) for at in range(40)]
    user.write(place / "in.jsonl", lines(*prompts))
    models = STACK_DIR / "user"
    printed = user.run(
        aiflux, "run", "--engine", "vllm", "--model", models / "smollm2", "--input", "in.jsonl",
        "--output", "out.json", "--mem", "6G", "--shards", "2", "--slots", "2", cwd=place,
        env={"AIFLUX_MODELS_DIR": str(models), "AIFLUX_ALLOW_CPU": "1"},
    )  # fmt: skip
    job = submitted(printed)
    journals = [place / f"out.json.aiflux/journal/shard-000{at}.jsonl" for at in range(2)]
    until_finished(journals[0], 2, seconds=600)
    found = engines(user)
    assert found
    assert [interfaces(pid) for pid in found] == [["lo"]] * len(found)
    user.run("scontrol", "requeue", f"{job}_0")
    for task in range(2):
        end = cluster.end(f"{job}_{task}", timeout=900)
        assert end.code == 0, end.fields
        assert end.fields["Restarts"] == str(1 - task)
    assert answers(place / "out.json").keys() == {f"r{at}" for at in range(40)}
    assert sum(map(finished, journals)) == 40, "no result was recorded twice"
    status = shard_status(place)["aiflux"]
    assert status["sealed"] is True
    assert status["image"]["engine"] == "vllm"
    assert user.none_left(), user.processes()


def test_the_image_pulls_a_model_without_aiflux_here(
    user: User, vllm_image: Path, place: Path
) -> None:
    files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": WEIGHTS}
    hub = FakeHub({"org/name": Repo({"main": COMMIT}, {COMMIT: files}, token="hf_secret")})
    hub.start()
    try:
        env = {"HF_ENDPOINT": hub.url, "AIFLUX_MODELS_DIR": str(place / "models")}
        pull = ["apptainer", "run", vllm_image, "--pull", "hf:org/name"]
        printed = user.run(*pull, cwd=place, env=env, code=4)
        assert "set HF_TOKEN" in printed
        printed = user.run(*pull, cwd=place, env={**env, "HF_TOKEN": "hf_secret"})
    finally:
        hub.stop()
    assert f"hf:org/name is commit {COMMIT}" in printed
    assert "hf_secret" not in printed
    assert (place / "models/hub/models--org--name/snapshots" / COMMIT / "config.json").is_file()
