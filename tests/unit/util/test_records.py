"""Dataclasses as JSON: what is written is read back, and a wrong type names its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.batch.input_file import InputFacts
from aiflux.core.batch.request import IgnoredField
from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, Shard
from aiflux.core.runs.status_file import StatusDetails, StatusFile
from aiflux.errors import ConfigError
from aiflux.slurm.jobs import Job, Submission, Submissions
from aiflux.util.records import KEY, OMITTED, from_json, read_record, to_json

PLAN = Plan(
    input=InputFacts(
        path=Path("/in.jsonl"),
        size=9,
        requests=3,
        digest="d",
        endpoints={"/v1/chat/completions": 3},
        ignored={"n": IgnoredField(2, (1, 3))},
    ),
    output=Path("/out.json"),
    models=("m:1",),
    options=RunOptions(stop=("END",), engine_env={"A": "b"}),
    shards=(Shard(0, 0, 9, 0, 3),),
    models_dir=None,
    created="2026-01-02T03:04:05.000Z",
)
JOBS = Submissions(
    Path("/i.sif"),
    SlurmConfig(time=None, shards="auto", setup=["module load x"]),
    (Submission("2026", "gpu", (Job("12", "0-1%2", 0, (0, 1)),), Path("/logs")),),
)


@dataclass(frozen=True)
class Leaf:
    name: str = field(metadata={KEY: "NAME"})
    size: float = field(default=0.5, metadata=OMITTED)


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    count: int | str | None = None


DETAILS = st.builds(
    StatusDetails,
    image=st.none() | st.dictionaries(st.text(), st.text()),
    **dict.fromkeys(("slurm", "gpus", "gpu_use", "progress", "totals", "engines", "merge"), ...),
)


@given(st.builds(StatusFile, details=DETAILS, errors=..., completed_at=...))
def test_every_status_is_read_back(status: StatusFile) -> None:
    written = json.dumps(to_json(status))
    assert json.dumps(to_json(from_json(StatusFile, json.loads(written)))) == written


@pytest.mark.parametrize("record", [PLAN, JOBS], ids=["plan.json", "jobs.json"])
def test_a_file_is_read_back(record: Any) -> None:
    assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record


def test_defaults_and_names_of_json() -> None:
    tree = Tree((Leaf("a"), Leaf("b", 2)), "many")
    content = {"leaves": [{"NAME": "a"}, {"NAME": "b", "size": 2}], "count": "many"}
    assert to_json(tree) == content
    assert from_json(Tree, {**content, "of a later version": 1}) == tree


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "the content is not an object"),
        ({}, "leaves is missing"),
        ({"leaves": {}}, "leaves is not a list"),
        ({"leaves": [{"NAME": "a"}, 3]}, r"leaves\[1\] is not an object"),
        ({"leaves": [{"NAME": 3}]}, r"leaves\[0\].NAME is not a string"),
        ({"leaves": [{"NAME": "a", "size": "2"}]}, r"leaves\[0\].size is not a number"),
        ({"leaves": [], "count": True}, "count is not a string"),
    ],
)
def test_an_error_names_its_place(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        from_json(Tree, content)


def test_a_file_without_a_record_is_missing_or_damaged(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    assert read_record(Tree, file) is None
    for content in (b"", b"{", b"\xff", b"[]", b"{}", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\S"):
            read_record(Tree, file)
    file.write_bytes(b'{"leaves": [{"NAME": "a"}]}')
    assert read_record(Tree, file) == Tree((Leaf("a"),))


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every part of a JSON value."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else ()
    for name, value in enumerate(content) if isinstance(content, list) else inner:
        yield from leaves(value, (*path, name))


class Strange:
    """A value of a type that no record has."""


@pytest.mark.parametrize("record", [PLAN, JOBS], ids=["plan.json", "jobs.json"])
def test_a_part_of_another_type_is_refused_wherever_it_is(record: Any) -> None:
    free = {"model_defaults", "image"}  # their content is not defined by us
    for path in leaves(json.loads(json.dumps(to_json(record)))):
        if free & set(path[:-1]):
            continue
        content = json.loads(json.dumps(to_json(record)))
        at = content
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = Strange()
        with pytest.raises((ValueError, ConfigError)):
            from_json(type(record), content)
