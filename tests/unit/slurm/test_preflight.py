"""The findings of the checks before submission."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from aiflux import __version__
from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.kinds import kind_named
from aiflux.errors import ExitCode, PreflightError, describe
from aiflux.slurm.cluster import ask_cluster, parse_gpus
from aiflux.slurm.preflight.cluster import (
    check_job_image,
    check_shards,
    cluster_checks,
    preflight,
)
from aiflux.slurm.preflight.local import (
    Finding,
    check_image,
    check_models,
    check_space,
    collect,
    refuse,
)
from aiflux.util.text import size_text
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.fake_site import ACCOUNTING, FakeSite, node, partition
from tests.unit.helpers import write_input

HERE = platform.machine()
OTHER = "arm64" if HERE == "x86_64" else "amd64"

OLLAMA = kind_named("ollama")
MAJOR, MINOR = (int(number) for number in __version__.split(".")[:2])


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    summary = scan_input(write_input(tmp_path / "in.jsonl", 3), None)
    return make_plan(
        summary, tmp_path / "out.json", RunOptions(), tmp_path / "models", kind_named("ollama")
    )


def asked(commands: FakeCommands, site: FakeSite, **slurm: Any) -> list[tuple[str, str, str]]:
    facts = ask_cluster(site.install(commands))
    found = collect(cluster_checks(facts, SlurmConfig(**slurm).checked()))
    return [(finding.level, finding.what, finding.fix) for finding in found]


@pytest.fixture
def commands(tmp_path: Path) -> FakeCommands:
    return FakeCommands(tmp_path / "fakes")


def test_a_job_that_fits_has_no_findings(commands: FakeCommands) -> None:
    assert asked(commands, FakeSite(), partition="gpu") == []
    assert asked(commands, FakeSite(), partition="gpu", gpus_per_node="a100:4", mem="0") == []
    assert asked(commands, FakeSite(), partition="gpu", gres="gpu:A100:4,shard:9") == []
    assert asked(commands, FakeSite(), gpus_per_node="0") == []


@pytest.mark.parametrize(
    ("slurm", "what", "fix"),
    [
        ({}, "--gpus-per-node 1 is more than any node of partition cpu has (0 GPUs)", "gpu, big"),
        ({"partition": "gpux"}, "no partition 'gpux'", "cpu, gpu, big"),
        ({"partition": "gpu,gpux"}, "no partition 'gpux'", "cpu, gpu, big"),
        ({"partition": "gpu", "gpus_per_node": "5"}, "(4 GPUs)", "suitable: big"),
        ({"partition": "gpu", "gpus_per_node": "h100:1"}, "(0 h100 GPUs)", "aiflux doctor"),
        ({"partition": "gpu", "gres": "gpu:v100:4"}, "--gres gpu:v100:4 is more", "aiflux doctor"),
        ({"partition": "gpu", "mem": "300G"}, "(256000 MB)", "--mem 256000M at most"),
        ({"partition": "gpu", "cpus_per_task": 65}, "(64 CPUs)", "--cpus-per-task 64 at most"),
        (
            {"partition": "gpu", "cpus_per_task": 64, "gpus_per_node": "v100:1"},
            "no single node of partition gpu has enough",
            "reduce one of them",
        ),
        (
            {"partition": "gpu", "time": "1-01"},
            "--time 1-01 is more",
            "use --time 1-00:00:00 or less",
        ),
        ({"partition": "gpu", "time": "UNLIMITED"}, "--time UNLIMITED is more", "1-00:00:00"),
        ({"partition": "gpu", "time": "0"}, "--time 0 (no limit) is more", "1-00:00:00"),
        ({"partition": "gpu", "time": "0-00:00"}, "--time 0-00:00 (no limit) is", "1-00:00:00"),
        ({"partition": "gpu", "constraint": "h100"}, "has the feature 'h100'", "a100, amd"),
    ],
)
def test_what_slurm_would_refuse_is_found(
    commands: FakeCommands, slurm: dict[str, Any], what: str, fix: str
) -> None:
    ((level, seen, remedy),) = asked(commands, FakeSite(), **slurm)
    assert level == "error"
    assert what in seen
    assert fix in remedy


def test_one_of_several_partitions_is_enough(commands: FakeCommands) -> None:
    assert asked(commands, FakeSite(), partition="gpu,big", gpus_per_node="8") == []
    assert len(asked(commands, FakeSite(), partition="gpu,cpu", gpus_per_node="8")) == 2


def test_nodes_that_are_down_make_a_job_wait(commands: FakeCommands) -> None:
    ((level, what, _),) = asked(commands, FakeSite(), partition="gpu", gpus_per_node="v100:1")
    assert level == "warning"
    assert "down or drained" in what


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
        ({"State": "DRAIN"}, "error", "accepts no jobs"),
        ({"State": "DOWN"}, "warning", "wait until it is up"),
        ({"RootOnly": "YES"}, "error", "for administrators"),
        ({"ReqResv": "YES"}, "error", "for reservations only"),
        ({"AllowGroups": "no-such-group"}, "error", "you are in none of them"),
        ({"AllowAccounts": "astro,geo"}, "error", "does not accept the account 'physics'"),
        ({"DenyAccounts": "physics"}, "error", "does not accept the account 'physics'"),
        ({"MaxMemPerNode": "16000"}, "error", "(16000 MB)"),
        ({"MaxCPUsPerNode": "2"}, "error", "(2 CPUs)"),
    ],
)
def test_closed_partitions_are_found(
    commands: FakeCommands, changes: dict[str, str], level: str, what: str
) -> None:
    site = FakeSite(settings=ACCOUNTING, partitions=[partition("gpu", **changes)])
    ((seen_level, seen, _),) = asked(commands, site, partition="gpu")
    assert (seen_level, what in seen) == (level, True), seen


@pytest.mark.parametrize(
    ("site", "slurm", "what"),
    [
        (FakeSite(default_account=""), {}, "you have no default account"),
        (FakeSite(), {"account": "astro"}, "cannot use the account 'astro'"),
        (FakeSite(), {"qos": "long"}, "no QOS 'long'"),
        (FakeSite(), {"qos": "short", "time": "05:00:00"}, "than the QOS 'short' allows"),
        (FakeSite(), {"qos": "short", "account": "CHEM"}, None),
        (FakeSite(), {"qos": "normal"}, None),
        (FakeSite(), {"qos": "short", "gpus_per_node": 2}, None),
        (
            FakeSite(),
            {"qos": "short", "gpus_per_node": 4},
            "a job requests 4 GPUs, but the QOS 'short' permits 2: it would wait forever",
        ),
        (FakeSite(), {"qos": "SHORT", "cpus_per_task": 33}, "33 CPU cores, but the QOS"),
        (FakeSite(), {"qos": "short", "mem": "65G"}, "66560 MB of memory, but the QOS"),
        (
            FakeSite(qos=("normal|01:00:00||||gres/gpu:a100=0",)),
            {"time": "02:00:00"},
            "than the QOS 'normal' allows",
        ),
        (
            FakeSite(qos=("normal|||||gres/gpu:a100=0",)),
            {"gpus_per_node": "a100:1"},
            "1 GPUs a100, but the QOS 'normal' permits 0",
        ),
        (
            FakeSite(accounts=("physics|normal|normal|||", "chem|short|short|||")),
            {"qos": "short"},
            "cannot use the QOS 'short' with the account 'physics'",
        ),
        (
            FakeSite(accounts=("physics|normal|normal|||", "chem|short|short|||")),
            {"qos": "short", "account": "chem"},
            None,
        ),
        (
            FakeSite(accounts=("physics|normal|normal||cpu=64,gres/gpu=1|", "chem|||||")),
            {"gpus_per_node": 2},
            "2 GPUs, but the account 'physics' permits 1: it would wait forever",
        ),
        (
            FakeSite(accounts=("physics|normal|normal|01:00:00||",)),
            {"time": "02:00:00"},
            "--time 02:00:00 is more than the account 'physics' allows",
        ),
        (
            FakeSite(accounts=("physics|normal|normal||cpu=64|cpu=2", "chem|normal|normal|||")),
            {"account": "chem", "cpus_per_task": 4},
            None,
        ),
        (
            FakeSite(groups=("physics|science|cpu=64,gres/gpu=1", "science|root|", "root||")),
            {"gpus_per_node": 2},
            "2 GPUs, but the group limit of account 'physics' permits 1: it would wait forever",
        ),
        (
            FakeSite(groups=("physics|science|", "science|root|", "root||gres/gpu=1,mem=1T")),
            {"gpus_per_node": 2},
            "2 GPUs, but the group limit of account 'root' (above 'physics') permits 1: it would",
        ),
        (
            FakeSite(groups=("physics|science|", "chem|arts|", "arts|root|gres/gpu=1", "root||")),
            {"gpus_per_node": 2},
            None,
        ),
    ],
)
def test_unknown_accounts_and_qos_are_found(
    commands: FakeCommands, site: FakeSite, slurm: dict[str, Any], what: str | None
) -> None:
    site.settings = ACCOUNTING
    found = asked(commands, site, partition="gpu", **slurm)
    assert [(level, what in seen) for level, seen, _ in found if what] == (
        [("error", True)] if what else []
    )
    assert what or found == []


def test_limits_that_are_not_enforced_are_warnings(commands: FakeCommands) -> None:
    site = FakeSite(settings={**ACCOUNTING, "AccountingStorageEnforce": "none"})
    found = asked(commands, site, partition="gpu", account="astro", qos="long")
    assert [level for level, _, _ in found] == ["warning", "warning"]


def test_a_qos_can_exceed_the_limits_of_its_partition(commands: FakeCommands) -> None:
    ((level, _, _),) = asked(commands, FakeSite(), partition="gpu", time="2-0", qos="long")
    assert level == "warning"


def test_a_site_that_rewrites_jobs_is_not_judged_by_its_defaults(commands: FakeCommands) -> None:
    site = FakeSite(settings={"JobSubmitPlugins": "lua"})
    assert asked(commands, site) == []
    assert len(asked(commands, site, partition="gpux")) == 1


def test_a_missing_default_partition_is_found(commands: FakeCommands) -> None:
    ((_, what, _),) = asked(commands, FakeSite(partitions=[partition("gpu")]))
    assert "no default partition" in what


def test_hidden_nodes_cause_no_finding(commands: FakeCommands) -> None:
    assert asked(commands, FakeSite(nodes=[]), partition="gpu", gpus_per_node="64") == []


def test_without_slurm_there_are_no_findings(tmp_path: Path) -> None:
    facts = ask_cluster({"PATH": str(tmp_path)})
    assert collect(cluster_checks(facts, SlurmConfig())) == ()


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu", {"": 1}),
        ("gpu:2", {"": 2}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0,2),gpu:v100:2(S:1),nvme:1", {"a100": 4, "v100": 2}),
        ("gres/gpu:2", {"": 2}),
    ],
)
def test_generic_resources_are_compared_with_the_nodes(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


def test_an_image_for_another_architecture_is_found(tmp_path: Path) -> None:
    image = make_sif(tmp_path / "a.sif", OTHER, version="1")
    wants = {"wants_gpus": True, "allow_cpu": False}
    (certain,) = check_image(image, {HERE}, OLLAMA, certain=True, **wants)
    (guessed,) = check_image(image, {HERE}, OLLAMA, certain=False, **wants)
    (mixed,) = check_image(image, {"x86_64", "aarch64"}, OLLAMA, certain=True, **wants)
    assert [certain.level, guessed.level, mixed.level] == ["error", "warning", "warning"]
    assert "--constraint" in mixed.fix


@pytest.mark.parametrize(
    ("version", "levels"),
    [
        ("0.1.0", ["error"]),
        (f"{MAJOR + 1}.0.0", ["error"]),
        (f"{MAJOR}.{MINOR}.99", []),
        (f"{MAJOR}.{MINOR + 1}.0", []),
        (str(MAJOR), []),
        ("unknown", []),
    ],
)
def test_an_image_of_another_major_version_is_refused(
    tmp_path: Path, version: str, levels: list[str]
) -> None:
    image = make_sif(tmp_path / "a.sif", version=version)
    wants = {"certain": True, "wants_gpus": False, "allow_cpu": False}
    found = [*check_image(image, {"x86_64"}, OLLAMA, **wants)]
    assert [finding.level for finding in found] == levels
    for finding in found:
        assert f"has AI-Flux {version}, which cannot read" in finding.what
        assert finding.fix == "build it again: make image"


@pytest.mark.parametrize(
    ("wants_gpus", "allow_cpu", "count"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_an_image_without_gpu_support_is_found(
    tmp_path: Path, wants_gpus: bool, allow_cpu: bool, count: int
) -> None:
    image = make_sif(tmp_path / "a.sif", version="1", cpu_only="yes")
    found = [
        *check_image(
            image, {"x86_64"}, OLLAMA, certain=True, wants_gpus=wants_gpus, allow_cpu=allow_cpu
        )
    ]
    assert len(found) == count
    assert all("--allow-cpu" in finding.fix for finding in found)


@pytest.mark.parametrize(
    "labels",
    [
        {"engine": "llamacpp", "engine_version": "b11669"},
        {"engine": "ollama", "engine_version": "0.33.3"},
        {"engine": "official Ollama 0.33.3, with GPU support", "ollama": "0.33.3"},
        {},
    ],
)
def test_an_image_with_another_engine_is_refused(tmp_path: Path, labels: dict[str, str]) -> None:
    """Images of earlier versions contain Ollama; without these labels the engine is unknown."""
    image = make_sif(tmp_path / "a.sif", version="1", **labels)
    wants = {"certain": True, "wants_gpus": False, "allow_cpu": False}
    found = [*check_image(image, {"x86_64"}, OLLAMA, **wants)]
    assert bool(found) is (labels.get("engine") == "llamacpp")
    for finding in found:
        assert "has the engine llamacpp, and the run needs Ollama" in finding.what
        assert "ENGINE=ollama" in finding.fix
    assert not [*check_image(image, {"x86_64"}, kind_named("external"), **wants)]


@pytest.mark.parametrize(
    ("nodes", "slurm", "vendors", "message"),
    [
        (["gpu:mi250x:8"], {}, "nvidia", "is for GPUs of NVIDIA, and the run gets GPUs of AMD"),
        (["gpu:mi250x:8"], {}, "amd", ""),
        (["gpu:a100:4"], {}, "amd", "is for GPUs of AMD, and the run gets GPUs of NVIDIA"),
        (["gpu:a100_1g.10gb:7"], {"gres": "gpu:a100_1g.10gb:2"}, "amd", "gets GPUs of NVIDIA"),
        (["gpu:4"], {}, "amd", ""),  # unknown: the job refuses them
        (["gpu:4"], {"gpu_vendor": "nvidia"}, "amd", "gets GPUs of NVIDIA"),
        (["gpu:4"], {"gpus_per_node": "mi300a:1"}, "nvidia", "gets GPUs of AMD"),
        (["gpu:a100:4", "gpu:mi300a:4"], {}, "amd", ""),
        (["gpu:a100:4", "gpu:mi300a:4"], {"gpus_per_node": "mi300a:2"}, "nvidia", "GPUs of AMD"),
        (["gpu:mi250x:8"], {}, "none", ""),
        (["gpu:mi250x:8"], {}, "amd nvidia", ""),
        (["gpu:mi250x:8"], {"gpus_per_node": "0"}, "nvidia", ""),
    ],
)
def test_an_image_for_the_gpus_of_another_vendor_is_refused(
    tmp_path: Path, commands: FakeCommands, nodes: list[str], slurm: dict[str, Any], vendors: str,
    message: str,
) -> None:  # fmt: skip
    image = make_sif(tmp_path / "a.sif", version="1", engine="ollama", engine_version="0.33.3",
                     gpu_vendors=vendors)  # fmt: skip
    site = FakeSite(nodes=[node(f"n{at}", Gres=gres, Arch="x86_64", AvailableFeatures="amd")
                           for at, gres in enumerate(nodes)])  # fmt: skip
    facts = ask_cluster(site.install(commands))
    config = SlurmConfig(partition="gpu", **slurm).checked()
    found = [*check_job_image(image, facts, config, RunOptions())]
    assert bool(found) is bool(message)
    for finding in found:
        assert message in finding.what
        assert ("GPU=amd" if "gets GPUs of AMD" in finding.what else "BASE=docker") in finding.fix
    assert not [*check_job_image(image, facts, config, RunOptions(allow_cpu=True))]


def test_a_missing_model_is_pulled_by_the_job(plan: Plan) -> None:
    (finding,) = check_models(plan)
    assert finding.level == "warning"
    assert finding.fix.endswith("aiflux models pull m:1")
    assert [*check_models(dataclasses.replace(plan, models_dir=None))] == []


@pytest.mark.ordinary_user
def test_a_missing_model_that_cannot_be_pulled_is_found(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(mode=0o555)
    assert [finding.level for finding in check_models(plan)] == ["warning", "error"]


@pytest.mark.parametrize(("factor", "level"), [(0.5, "warning"), (2.0, "error")])
def test_too_little_disk_space_is_found(plan: Plan, factor: float, level: str) -> None:
    assert [*check_space(plan)] == []
    disk = os.statvfs(plan.output.parent)
    size = int(disk.f_bavail * disk.f_frsize * factor)
    (finding,) = check_space(
        dataclasses.replace(plan, input=dataclasses.replace(plan.input, size=size))
    )
    assert finding.level == level
    assert " free; " in finding.what


def test_sizes_are_parsed() -> None:
    sizes = [size_text(count) for count in (0, 999, 1500, 2.5e7, 8e10, 3e12)]
    assert sizes == ["0 bytes", "999 bytes", "1.5 KB", "25 MB", "80 GB", "3.0 TB"]


def test_all_errors_are_reported_at_once(
    tmp_path: Path, plan: Plan, commands: FakeCommands
) -> None:
    site = FakeSite(nodes=[node("g1", Gres="gpu:2", Arch=HERE)])
    found = preflight(
        Config(environ={"HOME": str(tmp_path)}, directory=tmp_path),
        SlurmConfig(partition="gpu", gpus_per_node="3", time="3-0"),
        RunOptions(),
        make_sif(tmp_path / "a.sif", OTHER, version="1", cpu_only="yes"),
        plan,
        site.install(commands),
    )
    assert [finding.level for finding in found] == ["error"] * 4 + ["warning"]
    with pytest.raises(PreflightError) as raised:
        refuse(found)
    text = describe(raised.value)
    assert raised.value.exit_code == ExitCode.USAGE
    assert text.startswith("error: 4 problems found; no job was submitted\n  1. ")
    assert text.count("\n     -> ") == 4
    assert "--no-preflight" in text


def test_a_missing_image_is_reported_with_the_rest(
    tmp_path: Path, plan: Plan, commands: FakeCommands
) -> None:
    config = Config(environ={"HOME": str(tmp_path), "AIFLUX_IMAGE": str(tmp_path / "no.sif")})
    slurm = SlurmConfig(partition="gpux")
    found = preflight(config, slurm, RunOptions(), None, plan, FakeSite().install(commands))
    errors = [finding.what for finding in found if finding.level == "error"]
    assert len(errors) == 2
    assert "image not found: " in errors[0]
    assert "no.sif" in errors[0]


def test_a_misspelt_model_is_reported_once(
    tmp_path: Path, plan: Plan, commands: FakeCommands
) -> None:
    config = Config(environ={"HOME": str(tmp_path)})
    options = RunOptions(engine="llamacpp", model="lama3.2:3b")
    plan = dataclasses.replace(
        plan, options=options, models=("lama3.2:3b",), served_names=("lama3.2:3b",)
    )
    slurm = SlurmConfig(gpus_per_node="0")
    image = make_sif(tmp_path / "a.sif", version="1", engine="llamacpp")
    found = preflight(config, slurm, options, image, plan, FakeSite().install(commands))
    named = [finding.fix for finding in found if "lama3.2:3b" in finding.what]
    assert len(named) == 1
    assert named[0].startswith("did you mean llama3.2:3b?")


@pytest.mark.parametrize(("shards", "reported"), [("auto", False), (1, False), (100, True)])
def test_shards_without_requests_are_reported(
    tmp_path: Path, plan: Plan, shards: int | str, reported: bool
) -> None:
    found = [*check_shards(plan, SlurmConfig(shards=shards))]
    assert [finding.fix for finding in found] == ["use --shards 1 or less"] * reported


@pytest.mark.parametrize("submits", [True, False])
def test_a_slurm_that_does_not_respond_is_reported(
    tmp_path: Path, plan: Plan, commands: FakeCommands, *, submits: bool
) -> None:
    for name in ("sbatch", "scontrol"):
        commands.say(name, stderr="Unable to contact slurm controller", status=1)
    config = Config(environ={"HOME": str(tmp_path)}, directory=tmp_path)
    slurm = SlurmConfig(gpus_per_node="0")
    image = make_sif(tmp_path / "a.sif", version="1")
    environ = {"PATH": commands.path}
    found = preflight(config, slurm, RunOptions(), image, plan, environ, submits=submits)
    (what,) = [each.what for each in found if "Slurm" in each.what]
    assert what == "Slurm does not respond: partition, account and nodes are not checked"


def test_one_error_is_reported_without_a_list_and_warnings_pass() -> None:
    with pytest.raises(PreflightError) as raised:
        refuse([Finding("warning", "w", "x"), Finding("error", "it is wrong", "fix it")])
    assert describe(raised.value) == "error: it is wrong\n  -> fix it"
    refuse([Finding("warning", "w", "x")])
