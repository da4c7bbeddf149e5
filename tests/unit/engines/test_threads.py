"""An engine starts no more threads than its job has CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import make_plan
from aiflux.engines.base import EngineSpec
from aiflux.engines.kinds import kind_named
from aiflux.engines.ollama.store import missing_parts, read_manifest
from aiflux.engines.ollama.threads import store_with_threads
from aiflux.errors import ModelError
from aiflux.models.name import ModelName
from aiflux.util.process_limits import usable_cores, usable_cpus
from tests.unit.helpers import write_input
from tests.unit.made_models import put_model, tree

CPUS = len(os.sched_getaffinity(0))
OWN = b'{"stop": ["<|end|>"], "temperature": 0}'


def parameters(store: Path, name: ModelName) -> object:
    layers = read_manifest(store, name).layers
    (layer,) = [each for each in layers if each.kind.endswith("params")]
    return json.loads((store / "blobs" / layer.digest.replace(":", "-")).read_bytes())


@pytest.mark.parametrize(
    ("allotted", "found"), [("1", 1), ("1000", CPUS), ("", CPUS), ("0", CPUS), ("many", CPUS)]
)
def test_cpus_are_those_of_the_process_and_of_the_job(allotted: str, found: int) -> None:
    assert usable_cpus({"SLURM_CPUS_ON_NODE": allotted}) == found


def test_two_cpus_of_one_core_are_one_core(tmp_path: Path) -> None:
    """The folder is as the kernel's, of a node where all CPUs of this process are one core."""
    for cpu in os.sched_getaffinity(0):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-127\n")
    assert usable_cores(tmp_path) == 1
    assert usable_cores(tmp_path / "missing") == CPUS


def spec(tmp_path: Path, engines: int, **environ: str) -> EngineSpec:
    kind = kind_named("ollama")
    facts = scan_input(write_input(tmp_path / "in.jsonl", 1), "m:1", rules=kind.input_rules)
    plan = make_plan(facts, tmp_path / "o.json", RunOptions(model="m:1"), tmp_path, kind)
    return EngineSpec(
        0, plan, "m:1", (), tmp_path, tmp_path, environ, lambda _: None, engines=engines
    )


def test_engines_share_the_cpus_of_a_job(tmp_path: Path) -> None:
    whole = spec(tmp_path, 1)
    assert whole.cpus == CPUS
    assert whole.threads == (usable_cores() if (os.cpu_count() or 1) > CPUS else None)
    part = spec(tmp_path, 1, SLURM_CPUS_ON_NODE="1")
    assert (part.cpus, part.threads) == (1, 1 if (os.cpu_count() or 1) > 1 else None)
    assert spec(tmp_path, 10 * CPUS).cpus == 1


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ((), {"num_thread": 3}),
        ((OWN,), {"num_thread": 3, **json.loads(OWN)}),
        ((b'{"num_thread": 7}',), {"num_thread": 7}),
    ],
)
def test_a_view_of_ollamas_models_has_the_threads(
    tmp_path: Path, own: tuple[bytes, ...], wanted: dict[str, object]
) -> None:
    models, view = tmp_path / "models", tmp_path / "view"
    name = put_model(models, "m:1", b"weights", b"license", b"template", *own)
    before = tree(models)
    for _ in range(2):  # an engine that starts again
        digest = store_with_threads(models, name, 3, view)
        assert digest == read_manifest(models, name).digest
        assert missing_parts(view, name) == []
        assert parameters(view, name) == wanted
    assert tree(models) == before
    weights, *_ = [each for each in read_manifest(view, name).layers if "model" in each.kind]
    assert weights in read_manifest(models, name).layers
    assert (view / "blobs" / weights.digest.replace(":", "-")).is_symlink()


@pytest.mark.parametrize("content", [b"{", b"7"])
def test_damaged_parameters_are_reported(tmp_path: Path, content: bytes) -> None:
    name = put_model(tmp_path / "models", "m:1", b"weights", b"", b"", content)
    with pytest.raises(ModelError, match="the parameters of m:1 cannot be read") as caught:
        store_with_threads(tmp_path / "models", name, 3, tmp_path / "view")
    assert "models pull --again m:1" in str(caught.value.remedy)
