"""A run of a compressed input: the copy that it reads, resume, and what is refused."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.input_file import digest_of_lines, scan_input
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.runs.directory import RunDirectory, default_output
from aiflux.core.runs.input_copy import plain_input, temporary_copy
from aiflux.errors import ConfigError, ExitCode, InputError, RunConflictError
from aiflux.slurm.submit import plan_job
from aiflux.util.lease import acquire
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

AIFLUX = [sys.executable, "-m", "aiflux.cli"]


def compressed(working: Working) -> Working:
    """Replace the input by a compressed file of two members."""
    text = working.input.read_bytes()
    working.input.unlink()
    working.input = working.input.with_name("in.jsonl.gz")
    half = text.index(b"\n") + 5
    working.input.write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]))
    return working


def test_a_compressed_input_gives_the_same_plan_and_results(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b", "c")
        plain = working.open().plan
        compressed(working).output = tmp_path / "other.json"
        opened = working.open(shards=2)
        assert (opened.plan.id, opened.plan.input.digest) == (plain.id, plain.input.digest)
        assert opened.plan.input.named == working.input
        assert [working.shard(index) for index in (1, 0)] == [ExitCode.OK, ExitCode.OK]
    answers = [each["output"]["choices"][0]["message"]["content"] for each in working.results]
    assert answers == ["echo a", "echo b", "echo c"]
    assert digest_of_lines(working.input).hexdigest() == plain.input.digest


def test_the_same_command_resumes_and_leaves_the_copy_alone(tmp_path: Path) -> None:
    prompts = [*map(str, range(20))]
    with FaultyEngine(delay=0.05) as engine:
        working = compressed(Working(tmp_path, engine.url, concurrency=1).prompts(*prompts))
        working.stop_soon()
        assert working.run() is ExitCode.STOPPED
        copy = tmp_path / "out.json.input.jsonl"
        before = copy.stat()
        working.stopper = type(working.stopper)()
        assert working.run() is ExitCode.OK
        assert copy.stat() == before
        assert engine.seen.total() == len(prompts)
        assert len(working.results) == len(prompts)


def test_a_changed_archive_sends_only_what_changed(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = compressed(Working(tmp_path, engine.url).prompts("a", "b"))
        assert working.run() is ExitCode.OK
        more = Working(tmp_path, engine.url).prompts("a", "b", "c").input.read_bytes()
        working.input.write_bytes(gzip.compress(more))
        assert working.run(force=True) is ExitCode.OK
        assert len(working.results) == 3


@pytest.mark.parametrize("tail", [-20, None])
def test_a_damaged_archive_leaves_nothing_behind(tmp_path: Path, tail: int | None) -> None:
    working = Working(tmp_path, "http://127.0.0.1:9").prompts(*map(str, range(2000)))
    content = gzip.compress(working.input.read_bytes())
    working.input.write_bytes(content[:tail] + (b"" if tail else b"rest"))
    names = {path.name for path in tmp_path.iterdir()}
    assert working.run() is ExitCode.USAGE
    assert "in.jsonl" in str(working.error)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_bad_lines_are_those_of_the_file_that_the_user_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(f"{request_line('a')}\n{{broken\n".encode()))
    copied, error = temporary_copy(path), pytest.raises(InputError, match="1 line is")
    with copied as (plain, source), error as refused:
        scan_input(plain, "m:1", source=source)
    assert str(path) in refused.value.message
    assert "line 2: not JSON" in refused.value.problems[0]


def test_an_archive_in_the_place_of_its_copy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.json.input.jsonl"
    path.write_bytes(gzip.compress(b"x"))
    with pytest.raises(ConfigError, match="would be replaced"):
        plain_input(path, tmp_path / "out.json")
    assert gzip.decompress(path.read_bytes()) == b"x"


def test_a_copy_in_use_is_not_replaced(tmp_path: Path) -> None:
    working = compressed(Working(tmp_path, "http://127.0.0.1:9").prompts("a"))
    opened = working.open()
    working.input.write_bytes(gzip.compress(b"other"))
    before = opened.plan.input_path.read_bytes()
    with acquire(opened.run.lease(0), "a test"), pytest.raises(RunConflictError, match="in use"):
        working.open()
    assert opened.plan.input_path.read_bytes() == before
    assert RunDirectory.of_output(working.output) == opened.run


def test_the_default_output_has_no_suffix_of_the_archive(tmp_path: Path) -> None:
    assert default_output(Path("q.jsonl.gz"), tmp_path) == tmp_path / "q.results.json"


def test_a_compressed_pipe_is_decompressed(tmp_path: Path) -> None:
    lines = f"{request_line('a')}\n".encode()
    with FaultyEngine() as engine:
        words = ["run", "--input", "-", "--model", "m:1", "--engine-url", engine.url]
        words += ["--output", "out.json"]
        done = subprocess.run(
            [*AIFLUX, *words], input=gzip.compress(lines), cwd=tmp_path, check=False
        )
    assert done.returncode == 0
    assert (tmp_path / "out.json.input.jsonl").read_bytes() == lines


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_an_archive_that_fills_the_disk_stops_before_it_is_full(tmp_path: Path) -> None:
    """Run in a mount namespace of its own, which ends with the process."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(200 << 20)))
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=64m tmpfs '{disk}' && '{sys.executable}' -m aiflux.cli run "
        f"'{path}' --model m:1 --engine-url http://127.0.0.1:9 --output '{disk}/out.json'; "
        f"code=$?; ls -A '{disk}'; exit $code"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 5, done.stderr
    assert "decompresses to more than" in done.stderr
    assert "has only" in done.stderr
    assert done.stdout == ""


def test_a_job_reads_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    working = compressed(Working(tmp_path, None).prompts("a"))
    config = Config(arguments={"engine_command": "serve {model} --port {port}", "model": "m:1"})
    options, output = config.run_options(), working.output
    planned = plan_job(config, SlurmConfig(), working.input, output, options, check=False)
    copy = tmp_path / "out.json.input.jsonl"
    assert f"input={copy}\n" in planned.script
    assert copy.read_bytes().count(b"\n") == 1


def test_an_estimate_and_the_run_share_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with FaultyEngine(delay=0.01) as engine:
        compressed(Working(tmp_path, engine.url).prompts(*map(str, range(60))))
        words = ["in.jsonl.gz", "--engine-url", engine.url, "--output", "out.json"]
        assert main(["estimate", *words, "--requests", "20"]) == 0
        before = (tmp_path / "out.json.input.jsonl").stat()
        assert "--input in.jsonl.gz" in capsys.readouterr().out
        assert main(["run", *words]) == 0
    assert (tmp_path / "out.json.input.jsonl").stat() == before
    assert main(["check", "in.jsonl.gz"]) == 0
    assert f"{tmp_path / 'in.jsonl.gz'}: 60 requests" in capsys.readouterr().out
    assert main(["status", "out.json"]) == 0
    assert "in.jsonl.gz" in capsys.readouterr().out
