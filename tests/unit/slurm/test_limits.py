"""Limits of a site, which no setting of a user exceeds."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

import aiflux
from aiflux.cli.main import main
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.errors import ConfigError
from aiflux.slurm import SlurmRunner
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import request_line, write_input

LIMITS = """\
limits:
  shards: 8
  gpus_per_node: 2
  nodes_per_engine: 1
  time: 1-00:00:00
"""
BIG = {
    "shards": ["--shards", "9"],
    "gpus_per_node": ["--gpus-per-node", "a100:3"],
    "nodes_per_engine": ["--nodes-per-engine", "2", "--engine", "vllm", "--no-seal"],
    "time": ["--time", "24:00:01"],
}


@pytest.fixture
def site(tmp_path: Path, awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site's file; and a place with an input on a cluster that accepts every job."""
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("sbatch", "42\n")
    for silent in ("scontrol", "squeue", "sacct"):
        fakes.say(silent)
    monkeypatch.setenv("PATH", fakes.path)
    file = tmp_path / "site" / "site.yaml"
    file.parent.mkdir()
    file.write_text(LIMITS)
    monkeypatch.setenv("AIFLUX_SITE_CONFIG", str(file))
    monkeypatch.chdir(awkward)
    write_input(awkward / "in.jsonl", 40)
    make_sif(awkward / "aiflux.sif", version="1", cpu_only="no")
    return file


def run(*more: str) -> int:
    return main(["run", "in.jsonl", "-o", "out.json", "--model", "m:1", "--no-preflight", *more])


@pytest.mark.parametrize("name", [*BIG])
def test_an_error_names_the_limit_and_the_file_of_the_site(
    site: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*BIG[name]) == 2
    error = capsys.readouterr().err
    line = 1 + [text.split(":")[0].strip() for text in LIMITS.splitlines()].index(name)
    assert f"error: {name} is " in error
    assert f"but this site permits at most {LIMITS.splitlines()[line - 1].split(': ')[1]}" in error
    assert f"({site}, line {line})" in error
    assert not Path("out.json.aiflux").exists()


def test_the_most_is_permitted(site: Path) -> None:
    more = ["--shards", "8", "--gpus-per-node", "a100:2", "--time", "24:00:00"]
    assert run(*more) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--gres", "gpu:a100:3"],
        ["--gres", "gpu:a100:2,gpu:v100:1"],
        ["--gpus-per-node", "a100:2,v100:1"],
        ["--sbatch-arg", "gpus-per-socket=4"],
        ["--sbatch-arg", "tres-per-node=gres/gpu:8"],
        ["--sbatch-arg", "tres-per-task=gres/gpu:8"],
        ["--sbatch-arg", "exclusive"],
        ["--sbatch-arg", "exclus"],
        ["--sbatch-arg", "exclusive=user"],
        ["--sbatch-arg", "core-spec=1"],
        ["--sbatch-arg", "thread-spec=1"],
        ["--time", "UNLIMITED"],
        ["--time", "infinite"],
        ["--time", "0"],
        ["--time", "00:00:00"],
        ["--time", "0-0"],
        ["--time", "25:00:00", "--dry-run"],
    ],
)
def test_no_other_form_exceeds_it(
    site: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert str(site) in capsys.readouterr().err


def test_no_source_of_settings_exceeds_it(
    site: Path, awkward: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (awkward / "aiflux.yaml").write_text("slurm:\n  shards: 9\n")
    assert run() == 2
    (awkward / "aiflux.yaml").write_text("slurm:\n  time: null\n")
    assert run() == 2
    assert "time is the partition's default, but this site" in capsys.readouterr().err
    (awkward / "aiflux.yaml").unlink()
    monkeypatch.setenv("SLURM_TIME", "2-00:00:00")
    assert run() == 2
    monkeypatch.setenv("SLURM_TIME", "0")
    assert run() == 2
    monkeypatch.delenv("SLURM_TIME")
    for none in ("0", "00:00:00"):
        (awkward / "aiflux.yaml").write_text(f"slurm:\n  time: {none}\n")
        assert run() == 2
        assert "(no limit), but this site permits at most 1-" in capsys.readouterr().err
    (awkward / "aiflux.yaml").write_text('slurm:\n  sbatch_arg: {exclusive: ""}\n')
    assert run() == 2
    (awkward / "aiflux.yaml").unlink()
    for wide in ({"time": "0"}, {"sbatch_arg": {"exclusive": ""}}):
        with pytest.raises(ConfigError, match="this site permits"):
            SlurmRunner(workspace=awkward).run("in.jsonl", "out.json", **wide)
    with pytest.raises(ConfigError, match="permits at most 8"):
        SlurmRunner(workspace=awkward).run("in.jsonl", "out.json", shards=9)
    assert run() == 0
    assert main(["resume", "out.json", "--time", "2-00:00:00"]) == 2


def test_automatic_shards_stay_within_it(site: Path, awkward: Path) -> None:
    lines = [request_line(f"r{n}", body={"messages": [{}], "max_tokens": 10000}) for n in range(40)]
    (awkward / "in.jsonl").write_text("\n".join(lines))
    assert run("--shards", "auto", "--time", "1") == 0
    assert len(read_plan(RunDirectory.of_output(awkward / "out.json")).shards) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits: {shard: 8}", "unknown limit 'shard'"),
        ("limits: {shards: auto}", "'auto' is wrong"),
        ("limits: {time: soon}", "'soon' is wrong"),
        ("limits: [8]", "must contain KEY: VALUE lines"),
        ("shards: 8", "unknown section 'shards'"),
    ],
)
def test_a_wrong_limit_is_reported(
    site: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write_text(text)
    assert run() == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{site}, line 1" in error


def test_a_file_of_a_user_has_no_limits(
    site: Path, awkward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (awkward / "aiflux.yaml").write_text("limits:\n  shards: 80\n")
    assert run() == 2
    assert "-> only the file of the site has limits" in capsys.readouterr().err


def test_another_site_file_does_not_raise_the_limits_of_the_installation(
    site: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "sw" / "aiflux"
    venv.create(prefix, symlinks=True)
    folders = [str(Path(aiflux.__file__).parents[1]), sysconfig.get_path("purelib")]
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    (packages / "shared.pth").write_text("\n".join(folders))
    (prefix / "site.yaml").write_text("limits:\n  time: 8:00:00\n")
    command = [prefix / "bin" / "python", "-m", "aiflux.cli", "run", "in.jsonl", "--dry-run"]
    common = ["--model", "m:1", "--no-preflight"]

    def attempt(*more: str, named: str = str(site)) -> str:
        environ = {**os.environ, "AIFLUX_SITE_CONFIG": named}
        done = subprocess.run(
            [*command, *common, *more], env=environ, capture_output=True, text=True, check=False
        )
        error = done.stderr.partition("error: ")[2]
        assert done.returncode == (2 if error else 0), done.stderr
        return error

    assert f"at most 8:00:00 ({prefix}/site.yaml, line 2)" in attempt("--time", "10:00:00")
    assert f"at most 8 ({site}, line 2)" in attempt("--shards", "9")
    assert f"{prefix}/site.yaml" in attempt("--time", "10:00:00", named="")
    assert attempt("--time", "08:00:00") == ""
    assert sys.prefix != str(prefix)
