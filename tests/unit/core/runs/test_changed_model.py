"""A model that changed between two starts of a run: noticed, and never mixed unasked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.errors import ExitCode, ModelError, RunConflictError
from aiflux.models.name import parse_model_name
from tests.unit.helpers import write_program
from tests.unit.made_models import put_model
from tests.unit.made_snapshots import COMMIT, OTHER_COMMIT, put_folder, put_snapshot
from tests.unit.working import Working

FAKE = Path(__file__).parents[3] / "tools" / "fake_vllm.py"
NAME = "hf:org/name"


class Managed(Working):
    """A run with models of a models directory."""

    def __init__(self, folder: Path, engine: str = "vllm", model: str = NAME) -> None:
        self.models = folder / "models"
        super().__init__(folder, None, models_dir=self.models, engine=engine, model=model,
                         slots=2, context_length=512)  # fmt: skip

    def begin(self) -> Managed:
        """Leave the run as a start that was killed after its first result."""
        self.prompts("one", "two", model=None)
        self.open()
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        self.journal.write_text("{}\n", encoding="utf-8")
        return self

    def name(self, model: str) -> Managed:
        self.options["model"] = model
        return self


@pytest.fixture
def run(tmp_path: Path) -> Managed:
    """A run with the commit that ``main`` names; the branch ``v2`` names another."""
    made = Managed(tmp_path)
    put_snapshot(made.models / "hub", "org/name", COMMIT)
    put_snapshot(made.models / "hub", "org/name", OTHER_COMMIT, "v2")
    return made


def move_main(run: Managed, commit: str = OTHER_COMMIT) -> None:
    (run.models / "hub" / "models--org--name" / "refs" / "main").write_text(commit)


def test_the_plan_keeps_the_commit_of_its_model(run: Managed) -> None:
    run.begin()
    plan = read_plan(RunDirectory.of_output(run.output))
    assert (plan.models, plan.digests) == ((NAME,), (COMMIT,))


def test_a_branch_that_moved_is_noticed_on_resume(run: Managed) -> None:
    run.begin()
    run.open()
    move_main(run)
    with pytest.raises(RunConflictError) as caught:
        run.open()
    assert f"was commit {COMMIT}, and is now commit {OTHER_COMMIT}" in caught.value.message
    assert "--force-resume" in str(caught.value.remedy)
    run.name(f"{NAME}@{COMMIT}").open()  # the snapshot is still stored
    run.name(NAME).open(force_resume=True)
    run.open()


def test_another_revision_is_noticed_on_resume(run: Managed) -> None:
    run.name(f"{NAME}@v2").begin()
    for other in (NAME, f"{NAME}@{COMMIT}"):
        with pytest.raises(RunConflictError, match="changed since the run was planned"):
            run.name(other).open()
    for same in (f"{NAME}@{OTHER_COMMIT}", f"{NAME}@{OTHER_COMMIT[:8]}", f"{NAME}@v2"):
        run.name(same).open()


def test_a_directory_that_changed_is_noticed_on_resume(tmp_path: Path) -> None:
    folder = put_folder(tmp_path / "tiny")
    run = Managed(tmp_path, model=str(folder)).begin()
    (folder / ".gitattributes").write_text("downloads leave such files")
    run.open()
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(RunConflictError, match=r"was sha256:.*, and is now sha256:"):
        run.open()


@pytest.mark.parametrize("engine", ["ollama", "llamacpp"])
def test_a_tag_of_ollama_that_moved_is_noticed_on_resume(tmp_path: Path, engine: str) -> None:
    run = Managed(tmp_path, engine, "lab/one:1")
    put_model(run.models, "lab/one:1", b"weights")
    run.begin()
    put_model(run.models, "lab/one:1", b"other weights")
    with pytest.raises(RunConflictError, match="the model lab/one:1 changed"):
        run.open()
    run.open(force_resume=True)
    (run.models / parse_model_name("lab/one:1").manifest_path).unlink()
    run.open()  # the job pulls it


def test_a_plan_of_an_earlier_version_knows_no_digests(run: Managed) -> None:
    run.begin()
    path = RunDirectory.of_output(run.output).plan
    content = json.loads(path.read_text())
    del content["digests"]
    path.write_text(json.dumps(content))
    move_main(run)
    run.open()


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"#!/bin/sh\nexec '{sys.executable}' '{FAKE}' \"$@\"\n"
    program = write_program(tmp_path / "vllm", text)
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(program))


@pytest.mark.usefixtures("vllm")
def test_a_job_uses_the_planned_commit_or_none(run: Managed) -> None:
    run.prompts("one", "two", model=None).open()
    move_main(run)
    assert run.shard(0) is ExitCode.OK
    assert {each["metadata"]["model_digest"] for each in run.results} == {COMMIT}
    run.output.unlink()
    shutil.rmtree(RunDirectory.of_output(run.output).path)
    move_main(run, COMMIT)
    run.open()
    move_main(run)
    shutil.rmtree(run.models / "hub" / "models--org--name" / "snapshots" / COMMIT)
    assert run.shard(0) is ExitCode.ENGINE
    assert isinstance(run.error, ModelError)
    assert f"was commit {COMMIT}, and is now commit {OTHER_COMMIT}" in run.error.message
    assert not run.journal.exists() or not run.journal.read_bytes()


@pytest.mark.usefixtures("vllm")
def test_a_finished_run_stays_finished_when_its_model_changes(run: Managed) -> None:
    assert run.prompts("one", model=None).run() is ExitCode.OK
    move_main(run)
    assert run.open().finished
    assert run.run(force=True) is ExitCode.OK, "it starts over, so nothing is mixed"
    assert {each["metadata"]["model_digest"] for each in run.results} == {OTHER_COMMIT}
