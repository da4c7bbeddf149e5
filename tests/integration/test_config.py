"""``aiflux config init`` on the real cluster: Slurm accepts the settings it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import NO_SLURM, User
from tests.tools.make_sif import make_sif

pytestmark = pytest.mark.usefixtures("cluster")
REQUEST = {
    "custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": "m:1", "messages": [{"role": "user", "content": "Hi"}]},
}  # fmt: skip


@pytest.fixture
def folder(user: User) -> Path:
    """A directory with an input and a minimal image file."""
    folder = user.folder("first settings, a folder")
    user.write(folder / "in.jsonl", json.dumps(REQUEST) + "\n")
    make_sif(folder / "aiflux.sif", version="1", cpu_only="no")
    return folder


@pytest.mark.parametrize("changes", ["", "--gpus-per-node 2", "--partition urgent --shards auto"])
def test_slurm_accepts_a_job_with_the_first_settings(
    user: User, checkout: Path, folder: Path, changes: str
) -> None:
    aiflux = checkout / ".venv/bin/aiflux"
    user.run(aiflux, "config", "init", "--force", cwd=folder)
    shown = json.loads(user.run(aiflux, "config", "show", "--json", cwd=folder))["settings"]
    origins = {name: entry["from"] for name, entry in shown.items()}
    for name in ("partition", "gpus_per_node", "mem", "time", "cpus_per_task"):
        assert origins[name].startswith(f"{folder / 'aiflux.yaml'}, line ")
    assert origins["account"] == "default"
    options = ["--input", "in.jsonl", "--output", "out.json", *changes.split()]
    printed = user.run(aiflux, "run", *options, "--dry-run", "--show-script", cwd=folder)
    script = user.write(folder / "job.sbatch", printed[printed.index("#!/bin/bash") :])
    verdict = user.run("sbatch", "--test-only", script, cwd=folder)
    assert "to start at" in verdict


def test_the_doctor_accepts_the_first_settings(user: User, checkout: Path, folder: Path) -> None:
    aiflux = checkout / ".venv/bin/aiflux"
    user.run(aiflux, "config", "init", "--force", cwd=folder)
    printed = json.loads(user.run(aiflux, "doctor", "--json", cwd=folder, code=None))
    assert [line["level"] for line in printed if line["name"] == "your settings"] == ["ok"]


def test_without_slurm_the_file_says_so(user: User, checkout: Path, folder: Path) -> None:
    user.write(folder / "none.conf", NO_SLURM)
    env = {"SLURM_CONF": str(folder / "none.conf")}
    init = (checkout / ".venv/bin/aiflux", "config", "init", "--output", "none.yaml", "--force")
    assert "every setting has its default" in user.run(*init, cwd=folder, env=env)
    assert "Slurm was missing, or did not answer" in (folder / "none.yaml").read_text("utf-8")
