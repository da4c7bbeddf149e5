"""Slots from the memory of GPUs, and models that cannot fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.engines.ollama.kind import KIND
from aiflux.engines.ollama.store import model_digest
from aiflux.engines.sizing import context_length, slots
from aiflux.errors import ConfigError, InputError
from aiflux.models.catalog import read_catalog
from aiflux.models.figures import Figures
from aiflux.models.name import parse_model_name
from aiflux.slurm.cluster import ask_cluster
from aiflux.slurm.preflight.cluster import check_room
from aiflux.slurm.preflight.local import check_models
from aiflux.slurm.preflight.nodes import gpu_bytes, gpu_bytes_of_features, gpu_room
from tests.tools.make_sparse_gguf import install
from tests.unit.fake_commands import FakeCommands
from tests.unit.fake_site import FakeSite, node, partition
from tests.unit.helpers import write_input

GB = 2**30


def known(name: str) -> Figures:
    model = read_catalog().find(name)
    assert model is not None
    return model.figures


def plan_of(folder: Path, model: str, **options: Any) -> Plan:
    path = write_input(folder / "in.jsonl", 200, body={"messages": [{"role": "user",
                       "content": "hello"}]})  # fmt: skip
    summary = scan_input(path, model)
    chosen = RunOptions(model=model, **options)
    kind = engine_kind(chosen)
    return make_plan(summary, folder / "out.json", chosen, folder / "models", kind)


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"),
    [
        ("llama3.1:8b", (80,), 32),
        ("llama3.1:8b", (12,), 8),
        ("llama3.1:8b", (6,), 1),
        ("llama3.3:70b", (80,), 24),
        ("llama3.3:70b", (48,), 4),
        ("llama3.3:70b", (48, 48), 32),
        ("bge-m3:567m", (80,), 1),
    ],
)
def test_slots_follow_from_the_memory_of_the_gpus(
    tmp_path: Path, name: str, gigabytes: tuple[int, ...], expected: int
) -> None:
    free = tuple(number * GB for number in gigabytes)
    plan = plan_of(tmp_path, name, context_length=4096)
    assert slots(KIND, plan, ("0",) * len(free), 8, known(name), free) == expected


def test_a_given_number_of_slots_applies_and_unknown_memory_has_a_default(tmp_path: Path) -> None:
    figures = known("llama3.1:8b")
    plan = plan_of(tmp_path, "m")
    assert slots(KIND, plan, ("0",), 8) == 16
    assert slots(KIND, plan, ("0",), 8, figures) == 16
    assert slots(KIND, plan, (), 2, figures, ()) == 2
    assert slots(KIND, plan, (), 8, known("qwen3-vl:8b"), ()) == 1
    assert slots(KIND, plan, ("0",), 8, known("embeddinggemma:300m"), (80 * GB,)) == 1
    few = replace(plan, input=replace(plan.input, requests=3))
    assert slots(KIND, few, ("0",), 8, figures, (80 * GB,)) == 3
    assert slots(KIND, plan_of(tmp_path, "m", slots=5), ("0",), 8, figures, (80 * GB,)) == 5


def test_a_smaller_cache_type_allows_more_slots(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "m", context_length=4096)
    small = plan_of(tmp_path, "m", context_length=4096, engine_env={"OLLAMA_KV_CACHE_TYPE": "q8_0"})
    figures, free = known("llama3.1:8b"), (12 * GB,)
    assert slots(KIND, small, ("0",), 8, figures, free) > slots(
        KIND, plan, ("0",), 8, figures, free
    )


def test_the_context_is_at_most_that_of_the_model_s_training(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "m")
    assert context_length(plan) == 2048
    assert context_length(plan, 512) == 512
    assert context_length(plan_of(tmp_path, "m", context_length=4096), 512) == 4096


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("a100", 80), ("A100-SXM4-80GB", 80), ("nvidia_a100_40gb", 40), ("a100_3g.20gb", 20),
        ("h100.1g.10gb", 10), ("nvidia_h100_nvl", 96), ("rtx_2080_ti", 11), ("gtx1080ti", 11),
        ("geforce_rtx_3090", 24), ("tesla_v100", 32), ("v100", 32), ("rtx6000", 96),
        ("rtx_a6000", 48), ("l40s", 48), ("t4", 16), ("gh200", 144), ("mi250", 64),
        ("gpu", None), ("tesla", None), ("amd", None), ("avx512", None), ("mem512gb", None),
    ],
)  # fmt: skip
def test_the_memory_of_a_gpu_is_derived_from_its_name(name: str, gigabytes: int | None) -> None:
    assert gpu_bytes(name) == (None if gigabytes is None else gigabytes * GB)


def test_the_memory_of_gpus_is_derived_from_node_features() -> None:
    assert gpu_bytes_of_features(["amd", "a100", "a100_80gb"]) == 80 * GB
    assert gpu_bytes_of_features(["amd", "rome"]) is None


SITE = [
    node("g1", Gres="gpu:a100:4", AvailableFeatures="amd,a100-40gb"),
    node("g2", Gres="gpu:v100:2", Partitions="old"),
    node("g3", Gres="gpu:2", Partitions="plain", AvailableFeatures="l40s"),
    node("g4", Gres="gpu:2", Partitions="mystery"),
    node("g5", Gres="gpu:a100:4", Partitions="both"),
    node("g6", Gres="gpu:secret:4", Partitions="both"),
    node("g7", Gres="gpu:h100_1g.10gb:7", Partitions="mig"),
]
NAMES = ("gpu", "old", "plain", "mystery", "both", "mig")


@pytest.mark.parametrize(
    ("slurm", "kind", "gigabytes", "count"),
    [
        ({"partition": "gpu"}, "a100", 40, 1),
        ({"partition": "gpu", "gpus_per_node": "a100:4"}, "a100", 40, 4),
        ({"partition": "old", "gres": "gpu:v100:2"}, "v100", 32, 2),
        ({"partition": "gpu,old"}, "a100", 40, 1),
        ({"partition": "plain", "gpus_per_node": "2"}, "l40s", 48, 2),
        ({"partition": "mig", "gres": "gpu:h100_1g.10gb:2"}, "h100_1g.10gb", 10, 2),
        ({"partition": "mig", "gres": "gpu:1g.10gb:2"}, "1g.10gb", 10, 2),
        ({"partition": "mystery"}, None, 0, 0),
        ({"partition": "both"}, None, 0, 0),
        ({"partition": "both", "gpus_per_node": "a100:1"}, "a100", 80, 1),
        ({"partition": "gpu", "gpus_per_node": "0"}, None, 0, 0),
    ],
)
def test_the_gpus_that_a_job_may_get(
    tmp_path: Path, slurm: dict[str, Any], kind: str | None, gigabytes: int, count: int
) -> None:
    site = FakeSite(partitions=[partition(name) for name in NAMES], nodes=SITE)
    facts = ask_cluster(site.install(FakeCommands(tmp_path / "fakes")))
    config = SlurmConfig(**slurm).checked()
    room = gpu_room(facts, config, slurm["partition"].split(","))
    if kind is None:
        assert room is None
    else:
        assert room is not None
        assert (room.kind, room.size // GB, room.count) == (kind, gigabytes, count)


def refused(folder: Path, plan: Plan, **slurm: Any) -> list[tuple[str, str]]:
    site = FakeSite(partitions=[partition(name) for name in NAMES], nodes=SITE)
    facts = ask_cluster(site.install(FakeCommands(folder / "fakes")))
    config = Config(environ={"HOME": str(folder)}, directory=folder)
    found = [*check_room(plan, config, facts, SlurmConfig(**slurm).checked())]
    assert all(finding.level == "error" for finding in found)
    return [(finding.what, finding.fix) for finding in found]


@pytest.mark.parametrize(
    ("model", "options", "slurm", "fix"),
    [
        ("llama3.3:70b", {}, {"gres": "gpu:a100:1"}, "2 such GPUs for each engine are enough: "
         "--gpus-per-engine 2 --gres gpu:a100:2;"),
        ("llama3.3:70b", {}, {"gpus_per_node": "a100:1"}, "2 --gpus-per-node a100:2;"),
        ("llama3.3:70b", {}, {"gpus_per_node": "2"}, "are enough: --gpus-per-engine 2; or"),
        ("llama3.3:70b", {}, {"partition": "old"}, "--gpus-per-engine 2 --gpus-per-node 2;"),
        ("llama3.1:405b", {}, {"partition": "old"}, "8 such GPUs for each engine are enough, but "
         "no "
         "node here has more than 2"),
        ("qwen2.5:32b", {}, {"partition": "mig"}, "a whole GPU or a larger slice"),
        ("llama3.1:8b", {"slots": 64, "context_length": 16384}, {"partition": "old"},
         "--slots 13 at most"),
        ("llama3.1:8b", {"gpus_per_engine": 2}, {"partition": "old"}, "--gpus-per-node 2"),
        ("llama3.1:8b", {"gpus_per_engine": 2}, {"gres": "gpu:h100_1g.10gb:2", "partition": "mig"},
         "leave it out, and request a larger slice"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_fit_is_refused(
    tmp_path: Path, model: str, options: dict[str, Any], slurm: dict[str, Any], fix: str
) -> None:
    plan = plan_of(tmp_path, model, **options)
    ((_, seen),) = refused(tmp_path, plan, **{"partition": "gpu", **slurm})
    assert fix in seen


@pytest.mark.parametrize(
    ("model", "options", "slurm"),
    [
        ("llama3.1:8b", {}, {"partition": "gpu"}),
        ("llama3.3:70b", {}, {"partition": "both", "gres": "gpu:a100:1"}),  # may have 80 GB
        ("llama3.3:70b", {"gpus_per_engine": 2}, {"gres": "gpu:a100:2"}),
        ("llama3.1:405b", {}, {"partition": "mystery"}),
        ("llama3.1:405b", {"allow_cpu": True}, {"partition": "old"}),
        ("unheard-of:900b", {}, {"partition": "old"}),
    ],
)
def test_a_model_that_may_fit_is_accepted(
    tmp_path: Path, model: str, options: dict[str, Any], slurm: dict[str, Any]
) -> None:
    plan = plan_of(tmp_path, model, **options)
    assert refused(tmp_path, plan, **{"partition": "gpu", **slurm}) == []


def test_nearly_sufficient_memory_is_shown_with_a_decimal(tmp_path: Path) -> None:
    ((what, _),) = refused(tmp_path, plan_of(tmp_path, "llama3.3"), partition="gpu")
    assert "llama3.3:latest does not fit a GPU 'a100'" in what
    assert "it takes at least 43.4 GB, and it has 42.9 GB" in what


def test_a_model_without_the_requested_capability_is_refused(tmp_path: Path) -> None:
    ((what, fix),) = refused(tmp_path, plan_of(tmp_path, "bge-m3"), partition="mystery")
    assert "bge-m3:567m is for embeddings, and 200 requests ask for /v1/chat/completions" in what
    assert "use another model" in fix


def test_the_user_s_catalog_lists_the_capabilities_of_a_model(tmp_path: Path) -> None:
    own = tmp_path / ".config" / "aiflux" / "models.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("models: {bge-m3: {endpoints: [chat]}}", encoding="utf-8")
    assert refused(tmp_path, plan_of(tmp_path, "bge-m3"), partition="mystery") == []


def test_a_model_in_no_catalog_is_checked_by_its_own_file(tmp_path: Path) -> None:
    large = read_catalog().find("llama3.3:70b")
    assert large is not None
    plan = plan_of(tmp_path, "lab/large:1")
    install(tmp_path / "models", large, "lab/large:1")
    ((what, _),) = refused(tmp_path, plan, partition="old")
    assert "lab/large:1 does not fit a GPU 'v100': with 1 slot of 2048 tokens" in what


def test_a_required_digest_is_compared_with_the_stored_model(tmp_path: Path) -> None:
    small = read_catalog().find("smollm2:135m")
    assert small is not None
    install(tmp_path / "models", small, "lab/mine:1")
    digest = model_digest(tmp_path / "models", parse_model_name("lab/mine:1"))
    assert digest is not None
    for right in (digest, digest[:12]):
        plan = plan_of(tmp_path, f"lab/mine:1@sha256:{right}")
        assert [*check_models(plan)] == []
        assert plan.served(plan.models[0]) == "lab/mine:1"
    (finding,) = check_models(plan_of(tmp_path, "lab/mine:1@sha256:" + "0" * 64))
    assert finding.level == "error"
    assert digest in finding.what
    assert "0" * 64 in finding.what


def test_requests_can_require_one_digest_but_not_two(tmp_path: Path) -> None:
    def plan(*names: str) -> Plan:
        path = tmp_path / "in.jsonl"
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions",
             "body": {"model": name, "prompt": "x"}} for name in names
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return make_plan(scan_input(path, None), tmp_path / "o.json", RunOptions(), tmp_path, KIND)

    short, long = "m:1@sha256:" + "0" * 12, "m:1@sha256:" + "0" * 64
    assert plan("m:1", long, short, "M:1").models == (long,)
    with pytest.raises(InputError, match="require two digests of m:1"):
        plan(short, "m:1@sha256:" + "1" * 12)


@pytest.mark.parametrize("text", ["m@sha256:12", "m@md5:123456789012", "m@", "m@sha256:xyz"])
def test_an_invalid_digest_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="has the invalid digest"):
        parse_model_name(text)


def test_the_defaults_of_a_model_fill_open_parameters(tmp_path: Path) -> None:
    config = Config(
        arguments={"model": "qwen3:8b", "top_p": "0.5"},
        environ={"HOME": str(tmp_path)},
        directory=tmp_path,
    )
    summary = scan_input(write_input(tmp_path / "in.jsonl", 2, body={"messages": [
        {"role": "user", "content": "hello"}]}), "qwen3:8b")  # fmt: skip
    plan = make_plan(summary, tmp_path / "o.json", config.run_options(), tmp_path, KIND)
    assert plan.options.model_defaults == {"qwen3:8b": {"temperature": 0.6, "top_p": 0.95}}
    assert plan.options.parameters_of("qwen3:8b") == {"temperature": 0.6, "top_p": 0.5}
    assert plan.options.parameters_of("other:1b") == {"top_p": 0.5}
    assert plan.identity["defaults"] == plan.options.model_defaults
    foreign = config.run_options(engine_url="http://127.0.0.1:1")
    elsewhere = make_plan(summary, tmp_path / "o.json", foreign, None, kind_named("external"))
    assert elsewhere.options.model_defaults == {}
    assert "defaults" not in elsewhere.identity


def test_a_digest_cannot_be_required_of_a_running_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not report the digests"):
        plan_of(tmp_path, "m:1@sha256:" + "0" * 64, engine_url="http://127.0.0.1:1")
