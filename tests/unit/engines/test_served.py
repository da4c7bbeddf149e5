"""`--engine-url serve:NAME`: a run finds the engine, again after a requeue, and trusts no other."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from aiflux.core.config.config import Config
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.serve_directory import ServeDirectory, ServeState
from aiflux.errors import ConfigError, ExitCode, RejectedError, UsageError
from aiflux.slurm.serve import make_certificate
from tests.unit.made_serves import MadeServe, until
from tests.unit.working import Working


def working(folder: Path, name: str = "tiny", **options: object) -> Working:
    place = folder / "work"
    place.mkdir()
    return Working(place, f"serve:{name}", api_key="that of another server", **options)


def test_a_run_uses_its_key_and_its_certificate(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.start()
        run = working(tmp_path).prompts("one", "two", "three", model="tiny:latest")
        assert run.run() is ExitCode.OK, run.error
        assert len(run.results) == 3
        for file in run.output.parent.rglob("*"):
            assert not file.is_file() or made.directory.read_key().encode() not in file.read_bytes()


def test_a_run_waits_for_the_engine_and_follows_it(tmp_path: Path) -> None:
    """The job is preempted in mid-run, and starts again at another port."""
    with MadeServe(tmp_path) as made:
        run = working(tmp_path, engine_wait=30.0, concurrency=1).prompts(
            *(f"prompt {number}" for number in range(120)), model="tiny:latest"
        )
        code: list[ExitCode] = []
        thread = threading.Thread(target=lambda: code.append(run.run()))
        thread.start()
        until(lambda: any("not ready yet" in each for each in run.reporter.messages))
        first = made.start()
        until(lambda: run.journal.exists() and run.journal.read_bytes().count(b"\n") > 10)
        made.stopper.stop("signal SIGTERM")
        made.end()
        made.begin()
        made.directory.write_state(ServeState("starting"))
        assert made.start().port != first.port
        thread.join(60)
        assert code == [ExitCode.OK], run.error
        assert len(run.results) == 120


def test_another_certificate_is_refused(tmp_path: Path) -> None:
    """As where somebody else listens at the address, or the files are old."""
    with MadeServe(tmp_path) as made:
        made.start()
        make_certificate(made.directory, [])
        run = working(tmp_path, engine_wait=5.0).prompts("secret")
        assert run.run() is ExitCode.ENGINE
        assert isinstance(run.error, RejectedError)
        assert "the engine tiny: " in run.error.message
        assert "certificate" in run.error.message
        assert str(made.directory.certificate) in (run.error.remedy or "")


@pytest.mark.parametrize(
    ("reason", "seen"), [("idle", "has ended (idle)"), ("crashed", "has ended (crashed: broken)")]
)
def test_an_engine_that_has_ended_is_not_waited_for(tmp_path: Path, reason: str, seen: str) -> None:
    with MadeServe(tmp_path) as made:
        message = "broken" if reason == "crashed" else ""
        made.directory.write_state(ServeState("ended", reason=reason, message=message))
        run = working(tmp_path).prompts("one")
        assert run.run() is ExitCode.ENGINE
        assert run.error is not None
        assert seen in run.error.message
        assert "aiflux serve" in (run.error.remedy or "")


def test_an_engine_that_was_stopped_is_waited_for(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.directory.write_state(ServeState("ended", reason="signal"))
        run = working(tmp_path, engine_wait=0.5).prompts("one")
        assert run.run() is ExitCode.ENGINE
        assert run.error is not None
        assert "back if its job was requeued" in run.error.message


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with MadeServe(tmp_path):
        run = working(tmp_path, "tyni").prompts("one")
        assert run.run() is ExitCode.USAGE
        assert isinstance(run.error, UsageError)
        assert "tiny" in (run.error.remedy or "")


def test_files_that_others_can_write_are_refused(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.directory.path.chmod(0o777)
        run = working(tmp_path).prompts("one")
        assert run.run() is ExitCode.USAGE
        made.directory.path.chmod(0o700)


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "-a", ".a", "a" * 41, "a\n"])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        ServeDirectory.named(name, os.environ)


def test_the_setting_accepts_names_only() -> None:
    config = Config(arguments={"engine_url": "serve:tiny"})
    assert config.run_options().engine_url == "serve:tiny"
    assert RunOptions(engine_url="serve:tiny").engine == "external"
    with pytest.raises(ConfigError, match="serve:NAME"):
        Config(arguments={"engine_url": "serve:../x"}).run_options()
