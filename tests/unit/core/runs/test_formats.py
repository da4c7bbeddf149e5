"""Runs that earlier releases wrote are read, as docs/upgrading.md promises.

Each folder of ``formats`` has an input and the run directory of it, without the output, as that
release wrote them. Add one for a release that changed a file; never change one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aiflux.cli.main import main
from tests.tools.faulty_engine import FaultyEngine

FORMATS = Path(__file__).parent / "formats"


@pytest.fixture(params=sorted(path.name for path in FORMATS.iterdir()))
def output(request: pytest.FixtureRequest, awkward: Path) -> Path:
    """The output of a copy of a run."""
    written = FORMATS / str(request.param)
    output = awkward / "out.json"
    shutil.copy(written / "in.jsonl", awkward)
    shutil.copytree(written / "run", run := awkward / "out.json.aiflux")
    run.chmod(0o700)
    for path in run.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"@DIRECTORY@', json.dumps(str(awkward))[:-1]), "utf-8")
    return output


def test_the_output_is_written_again(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(output), "--again"]) == 3
    entries = json.loads(output.read_text(encoding="utf-8"))
    assert [entry["input"]["custom_id"] for entry in entries] == ["a", "b", "c"]
    assert [entry["output"] is None for entry in entries] == [False, True, False]
    assert entries[2]["output"]["choices"][0]["message"]["content"] == "three"
    capsys.readouterr()
    assert main(["status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 1


def test_the_rest_is_processed(output: Path) -> None:
    journal = output.parent / "out.json.aiflux" / "journal" / "shard-0000.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    source = str(output.parent / "in.jsonl")
    with FaultyEngine(models=("m:1",)) as engine:
        options = ["--engine-url", engine.url, "--model", "m:1", "--retry-delay", "0"]
        assert main(["run", source, "--output", str(output), *options]) == 3
    assert list(engine.seen) == ["answer:three"]
    assert len(json.loads(output.read_text(encoding="utf-8"))) == 3
