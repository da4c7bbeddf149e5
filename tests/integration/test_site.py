"""Diagnoses of the real site: the doctor's lines, and findings that Slurm confirms."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.image.sif import machine_arch, read_image
from aiflux.slurm.cluster import ask_cluster
from aiflux.slurm.preflight.cluster import check_job_image, cluster_checks
from aiflux.slurm.preflight.local import Finding, collect
from tests.integration.conftest import NO_SLURM, Cluster, User, request, until
from tests.integration.conftest import lines as request_lines

pytestmark = pytest.mark.usefixtures("cluster")
SMALL = {"mem": "1G", "cpus_per_task": 1, "time": "5"}


@pytest.fixture
def facts_env(user: User) -> dict[str, str]:
    return user.environment()


def findings(environ: dict[str, str], **slurm: object) -> list[Finding]:
    config = SlurmConfig(**{**SMALL, **slurm}).checked()  # type: ignore[arg-type]
    return [*collect(cluster_checks(ask_cluster(environ), config))]


def test_the_image_is_read_without_apptainer(user: User, image: Path) -> None:
    facts = read_image(image)
    assert facts.arch == machine_arch(os.uname().machine)
    assert facts.cpu_only
    printed = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    assert facts.labels == printed["data"]["attributes"]["labels"]


def test_a_cpu_image_with_gpus_is_rejected(facts_env: dict[str, str], image: Path) -> None:
    facts = ask_cluster(facts_env)
    wants = SlurmConfig(**SMALL).checked()  # type: ignore[arg-type]
    (finding,) = check_job_image(image, facts, wants, RunOptions())
    assert "CPU build" in finding.what
    assert [*check_job_image(image, facts, wants, RunOptions(allow_cpu=True))] == []


def test_a_job_that_fits_has_no_findings(facts_env: dict[str, str]) -> None:
    assert findings(facts_env) == []
    assert findings(facts_env, partition="urgent", gpus_per_node="2") == []
    assert findings(facts_env, partition="gpu,urgent", gres="gpu:1") == []


def reasoned(cluster: Cluster, job: str) -> dict[str, str]:
    """Return a job once its reason is known: Slurm 24.11 has none until it first tries a job."""

    def known() -> dict[str, str]:
        fields = cluster.fields(job)
        return {} if fields["Reason"] == "None" else fields

    return until(known, f"the reason why job {job} waits", 30)


@pytest.mark.parametrize(
    ("slurm", "options"),
    [
        ({"partition": "none-such"}, ["--partition=none-such"]),
        ({"gpus_per_node": "3"}, ["--gpus-per-node=3"]),
        ({"gpus_per_node": "a100:1"}, ["--gpus-per-node=a100:1"]),
        ({"gres": "gpu:3"}, ["--gres=gpu:3"]),
        ({"mem": "999G"}, ["--mem=999G"]),
        ({"constraint": "none-such"}, ["--constraint=none-such"]),
        ({"cpus_per_task": 999}, ["--cpus-per-task=999"]),
        ({"time": "2-0"}, ["--time=2-0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_slurm_confirms_the_findings(
    user: User,
    cluster: Cluster,
    facts_env: dict[str, str],
    slurm: dict[str, str],
    options: list[str],
) -> None:
    """The real sbatch rejects the job, or the job would wait forever."""
    (finding,) = findings(facts_env, **slurm)
    assert finding.level == "error"
    printed = user.run("sbatch", "--parsable", *options, "--wrap=true", code=None)
    job = printed.strip().splitlines()[-1]
    if job.isdigit():
        fields = reasoned(cluster, job)
        assert fields["JobState"] == "PENDING"
        assert fields["Reason"] not in ("None", "Resources", "Priority")
        user.run("scancel", job)
    else:
        assert "error" in printed


@pytest.fixture
def t4_nodes(stack: dict[str, str]) -> Iterator[None]:
    """For a while, the nodes have a feature that names their GPUs."""
    change = ["scontrol", "update", "NodeName=n[1-2]"]
    env = {**os.environ, "SLURM_CONF": stack["SLURM_CONF"]}
    subprocess.run([*change, "AvailableFeatures=t4", "ActiveFeatures=t4"], env=env, check=True)
    yield
    subprocess.run([*change, "AvailableFeatures=", "ActiveFeatures="], env=env, check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change nodes of Slurm")
@pytest.mark.usefixtures("t4_nodes")
def test_a_model_that_does_not_fit_is_refused_before_submission(
    user: User, checkout: Path, place: Path
) -> None:
    user.write(place / "in.jsonl", request_lines(request("r", "Hi", model=None)))
    printed = user.run(
        checkout / ".venv/bin/aiflux", "run", "in.jsonl", "--output", "out.json", "--engine",
        "vllm", "--model", "hf:Qwen/Qwen3-32B", "--gpus-per-node", "1", cwd=place, code=2,
    )  # fmt: skip
    assert "Qwen/Qwen3-32B does not fit a GPU 't4'" in printed
    assert "no job was submitted" in printed
    assert user.run("squeue", "--noheader", "--user", user.name) == ""


def test_the_doctor_describes_the_real_site(user: User, checkout: Path, image: Path) -> None:
    env = {"SLURM_MEM": "1G", "AIFLUX_IMAGE": str(image)}
    doctor = checkout / ".venv/bin/aiflux"
    lines = json.loads(user.run(doctor, "doctor", "--json", env=env))
    levels: dict[str, list[str]] = {}
    for line in lines:
        levels.setdefault(line["name"], []).append(line["level"])
    for name in ("slurm", "apptainer", "sealing", "building", "your settings", "partition gpu"):
        assert levels[name] == ["ok"], (name, lines)
    assert levels["image"] == ["ok", "warn"]
    printed = {line["name"]: line["what"] for line in lines}
    assert "2 nodes with 2 GPUs" in printed["partition gpu"]


def test_the_doctor_reports_missing_parts(user: User, checkout: Path) -> None:
    place = user.folder("doctor")
    user.write(place / "none.conf", NO_SLURM)
    env = {"SLURM_CONF": str(place / "none.conf"), "AIFLUX_IMAGE": str(place / "none.sif")}
    printed = user.run(checkout / ".venv/bin/aiflux", "doctor", cwd=place, env=env, code=2)
    assert "FAIL image: " in printed
    assert "FAIL slurm: Slurm does not respond" in printed
