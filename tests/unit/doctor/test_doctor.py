"""``aiflux doctor``: all lines, with fake commands, files and directories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.doctor import host
from aiflux.doctor.apptainer import containers, gpus, is_setuid
from aiflux.doctor.host import quotas
from aiflux.doctor.slurm import scheduler
from aiflux.util.diagnosis import Diagnosis
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.fake_site import ACCOUNTING, FakeSite, node, partition


@pytest.fixture
def commands(tmp_path: Path) -> FakeCommands:
    return FakeCommands(tmp_path / "fakes")


def by_name(lines: list[Diagnosis]) -> dict[str, list[Diagnosis]]:
    found: dict[str, list[Diagnosis]] = {}
    for line in lines:
        assert bool(line.fix) == (line.level != "ok"), line
        found.setdefault(line.name, []).append(line)
    return found


def of_slurm(
    commands: FakeCommands, site: FakeSite, slurm: SlurmConfig | None = None
) -> dict[str, list[Diagnosis]]:
    for name in ("sbatch", "squeue", "scancel"):
        commands.say(name)
    return by_name([*scheduler(slurm or SlurmConfig(partition="gpu"), site.install(commands))])


def test_slurm_is_described(commands: FakeCommands) -> None:
    found = of_slurm(commands, FakeSite(settings=ACCOUNTING))
    assert found["slurm"][0].what == "23.11.4, cluster delta"
    assert "1000 tasks" in found["arrays"][0].what
    assert found["accounting"][0].what == (
        "is enforced; your accounts: chem, physics; default: physics"
    )
    assert found["partition gpu"][0].what == (
        "1 node with 4 a100, 1 node with 1 p4 and 2 v100; up to 1-00:00:00"
    )
    assert "partition cpu" not in found
    assert "fits" in found["your settings"][0].what
    assert {line.level for lines in found.values() for line in lines} == {"ok"}


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({"gpus_per_node": "2", "cpus_per_task": 1}, "2 GPUs, 1 CPU, 32G"),
        ({"gpus_per_node": "a100:1"}, "GPUs a100:1, 4 CPUs, 32G"),
        ({"gres": "gpu:a100:1"}, "gres gpu:a100:1, 4 CPUs, 32G"),
    ],
)
def test_the_job_as_configured_is_shown(
    commands: FakeCommands, asked: dict[str, Any], shown: str
) -> None:
    found = of_slurm(commands, FakeSite(), SlurmConfig(partition="gpu", **asked).checked())
    assert shown in found["your settings"][0].what


def test_a_default_job_that_does_not_fit_is_a_warning(commands: FakeCommands) -> None:
    found = of_slurm(commands, FakeSite(), SlurmConfig(partition="gpu", mem="999G"))
    assert found["your settings"][0].level == "warn"
    assert "--mem 256000M at most" in found["your settings"][0].fix


def test_a_minimal_site_gives_warnings(commands: FakeCommands) -> None:
    site = FakeSite(
        settings={"SLURM_VERSION": "19.05.8", "MaxArraySize": "0", "PreemptType": "preempt/none"},
        nodes=[node("c1", Partitions="cpu")],
    )
    found = of_slurm(commands, site, SlurmConfig(gpus_per_node="0"))
    assert [found[name][0].level for name in ("slurm", "arrays", "GPUs")] == ["warn"] * 3


def test_a_closed_or_down_partition_is_reported(commands: FakeCommands) -> None:
    site = FakeSite(
        settings=ACCOUNTING,
        partitions=[partition("gpu", AllowAccounts="astro"), partition("big")],
        nodes=[
            node("g1", Gres="gpu:2"),
            node("b1", Gres="gpu:2", Partitions="big", State="DOWN*"),
        ],
    )
    found = of_slurm(commands, site)
    assert "not for you" in found["partition gpu"][0].what
    assert found["partition big"][0].level == "warn"


def test_missing_slurm_is_reported(tmp_path: Path) -> None:
    (line,) = scheduler(SlurmConfig(), {"PATH": str(tmp_path)})
    assert line.level == "fail"
    assert "sbatch, squeue, scancel, scontrol not on PATH" in line.what


def test_a_silent_controller_is_reported(commands: FakeCommands) -> None:
    for name in ("sbatch", "squeue", "scancel"):
        commands.say(name)
    commands.say("scontrol", stderr="slurm_load_ctl_conf error: Unable to contact", status=1)
    (line,) = scheduler(SlurmConfig(), {"PATH": commands.path})
    assert line.level == "fail"
    assert "Unable to contact" in line.what


def config(folder: Path, **environ: str) -> Config:
    return Config(environ={"HOME": str(folder), **environ}, directory=folder)


def of_containers(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, image: Path
) -> dict[str, list[Diagnosis]]:
    monkeypatch.setenv("PATH", str(commands.folder) + ":/usr/bin:/bin")
    settings = config(image.parent, AIFLUX_IMAGE=str(image))
    return by_name([*containers(settings, image.parent)])


APPTAINER = """
case $1 in
--version) echo "apptainer version {version}" ;;
buildcfg) echo LIBEXECDIR={libexec} ;;
exec) printf '\\033[31mFATAL:   no such namespace\\033[0m\\n\\033[0m\\n' >&2; exit {seals} ;;
esac
"""


def test_container_and_image_are_described(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, awkward: Path
) -> None:
    commands.add("apptainer", APPTAINER.format(version="1.4.5", libexec="/none", seals=0))
    image = make_sif(awkward / "a.sif", os_arch(), version="1", ollama="0.9.3", cpu_only="yes")
    found = of_containers(commands, monkeypatch, image)
    assert found["apptainer"][0].what == "apptainer version 1.4.5"
    assert "aiflux 1, Ollama 0.9.3" in found["image"][0].what
    assert "CPU-only" in found["image"][1].what
    assert found["sealing"][0].level == "ok"
    (probe,) = [call for call in commands.calls("apptainer") if call.argv[0] == "exec"]
    sealed = ["--containall", "--pwd", "/", "--net", "--network", "none"]
    assert probe.argv[1:] == [*sealed, str(image), "true"]


def test_an_image_for_another_architecture_is_reported_with_its_name(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands.add("apptainer", APPTAINER.format(version="1.4.5", libexec="/none", seals=0))
    other = "arm64" if os_arch() == "amd64" else "amd64"
    found = of_containers(commands, monkeypatch, make_sif(tmp_path / "a.sif", other, version="1"))
    (warning,) = [line for line in found["image"] if line.what.startswith("the image is for")]
    assert warning.fix.startswith(f"check that the compute nodes are {other}, or")


def test_an_image_of_another_major_version_is_a_failure(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands.add("apptainer", APPTAINER.format(version="1.4.5", libexec="/none", seals=0))
    image = make_sif(tmp_path / "a.sif", os_arch(), version="0.1.0")
    (line,) = of_containers(commands, monkeypatch, image)["image"]
    assert line.level == "fail"
    assert "has AI-Flux 0.1.0" in line.what
    assert line.fix.startswith("build it again: make ")


def os_arch() -> str:
    return "amd64" if os.uname().machine == "x86_64" else "arm64"


def test_singularity_ce_is_checked_as_itself(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has its own squashfuse, and no build with the fakeroot command."""
    helper = tmp_path / "libexec" / "singularity" / "bin" / "squashfuse_ll"
    helper.parent.mkdir(parents=True)
    helper.touch()
    for name in ("bash", "basename", "dirname", "mkdir", "env"):
        (commands.folder / name).symlink_to(f"/usr/bin/{name}")
    commands.say("fakeroot")
    shell = APPTAINER.replace("apptainer version", "singularity-ce version")
    commands.add(
        "singularity", shell.format(version="4.5.1", libexec=tmp_path / "libexec", seals=0)
    )
    image = make_sif(tmp_path / "a.sif", version="1")
    monkeypatch.setenv("PATH", str(commands.folder))  # without Apptainer
    found = by_name([*containers(config(tmp_path, AIFLUX_IMAGE=str(image)), tmp_path)])
    assert found["singularity"][0] == Diagnosis("singularity", "ok", "singularity-ce version 4.5.1")
    assert "squashfuse is not installed" not in found["mounting"][0].what
    assert found["building"][0].what.startswith("images cannot be built here")
    assert found["sealing"][0].level == "ok"


def test_failed_sealing_shows_the_reason(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands.add("apptainer", APPTAINER.format(version="0.9.0", libexec="/none", seals=255))
    found = of_containers(commands, monkeypatch, make_sif(tmp_path / "a.sif", version="1"))
    assert found["apptainer"][0].level == "fail"
    assert found["sealing"][0].what.endswith("started here: FATAL:   no such namespace")


def test_missing_apptainer_is_a_warning_and_a_missing_image_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = config(tmp_path, AIFLUX_IMAGE=str(tmp_path / "none.sif"))
    lines = [*containers(settings, tmp_path)]
    assert [(line.name, line.level) for line in lines] == [("apptainer", "warn"), ("image", "fail")]


def test_a_server_of_engine_command_needs_no_image(tmp_path: Path) -> None:
    settings = config(tmp_path, PATH=str(tmp_path), AIFLUX_ENGINE_COMMAND="x {port}")
    (image,) = by_name([*containers(settings, tmp_path)])["image"]
    assert (image.level, image.what.startswith("not needed")) == ("ok", True)


def test_a_foreign_image_is_a_failure(
    commands: FakeCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands.add("apptainer", APPTAINER.format(version="1.4.5", libexec="/none", seals=0))
    (tmp_path / "a.sif").write_bytes(b"no image")
    make_sif(tmp_path / "b.sif", engine="theirs")
    for name in ("a.sif", "b.sif"):
        found = of_containers(commands, monkeypatch, tmp_path / name)
        assert found["image"][0].level == "fail"
    assert "exec" not in {call.argv[0] for call in commands.calls("apptainer")}


def test_a_starter_owned_by_the_user_is_not_setuid(tmp_path: Path) -> None:
    starter = tmp_path / "apptainer" / "bin" / "starter-suid"
    starter.parent.mkdir(parents=True)
    starter.touch()
    assert not is_setuid(tmp_path / "apptainer", {"LIBEXECDIR": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("user/max_user_namespaces", "0\n", "user.max_user_namespaces is 0"),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone is 0"),
        ("kernel/unprivileged_userns_clone", "1", None),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns is 1",
        ),
        ("user/max_user_namespaces", "63000", None),
    ],
)
def test_user_namespaces(tmp_path: Path, name: str, value: str, reason: str | None) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(value, encoding="utf-8")
    assert host.user_namespaces(tmp_path) == reason


def test_subordinate_ids(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text("ann:100000:65536\n1001:165536:65536\n", encoding="utf-8")
    (tmp_path / "subgid").write_text("ann:100000:65536\n", encoding="utf-8")
    assert host.subordinate_ids("ann", 1000, tmp_path) == []
    assert host.subordinate_ids("bob", 1001, tmp_path) == [str(tmp_path / "subgid")]


def test_file_system_types_are_detected(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    folder = str(tmp_path.resolve() / "a b").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nmds {folder} lustre rw 0 0\n", encoding="utf-8")
    assert host.file_system(tmp_path / "a b" / "c", mounts) == "lustre"
    assert host.file_system(tmp_path, mounts) == "ext4"


def test_complete_and_incomplete_models_are_listed(tmp_path: Path) -> None:
    library = tmp_path / "manifests" / "registry.ollama.ai" / "library"
    for name, size in (("complete", 2), ("incomplete", 3)):
        (library / name).mkdir(parents=True)
        layer = {"digest": "sha256:" + "a" * 64, "size": size}
        (library / name / "1b").write_text(json.dumps({"config": layer, "layers": []}))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("sha256-" + "a" * 64)).write_bytes(b"ab")
    complete, incomplete, _ = host.models(config(tmp_path, AIFLUX_MODELS_DIR=str(tmp_path)))
    assert (complete.level, complete.what) == ("ok", f"{tmp_path}: 1 model (complete:1b)")
    assert (incomplete.level, incomplete.fix) == ("warn", "aiflux models pull incomplete:1b")


def test_an_empty_models_directory_is_a_warning(tmp_path: Path) -> None:
    first, room = host.models(config(tmp_path))
    assert (first.level, "no models yet" in first.what) == ("warn", True)
    assert "free" in room.what


def test_unknown_and_invalid_settings_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path), "AIFLUX_MODEL_DIR": "/x", "MAX_RETRIES": "many"}
    settings, lines = host.load_config(environ)
    assert [line.level for line in lines] == ["warn", "fail"]
    assert lines[0].fix.startswith("did you mean AIFLUX_MODELS_DIR?")
    assert "MAX_RETRIES" in lines[1].what
    assert settings.models_dir == tmp_path / ".local/share/aiflux/models"
    (tmp_path / ".env").write_text("AIFLUX_IMGE=/x\nOF_OTHERS=1\nAIFLUX_API_KEY=k\n")
    _, (_, misspelt, key, _) = host.load_config(environ)
    assert misspelt.what == "AIFLUX_IMGE in ./.env is unknown"
    assert key.what == "AIFLUX_API_KEY in ./.env is not read from there"
    assert misspelt.fix == "did you mean AIFLUX_IMAGE? remove AIFLUX_IMGE"
    (tmp_path / ".env").write_text("AIFLUX_IMGE\n")
    _, (_, wrong) = host.load_config(environ)
    assert (wrong.level, "is not KEY=VALUE" in wrong.what) == ("fail", True)


@pytest.mark.parametrize(
    "proxy",
    ["http://ann:secret@proxy:3128", "ann:secret@proxy:3128", "http://ann:se/cr@secret@proxy:3128"],
)
def test_proxies_are_shown_without_passwords(proxy: str) -> None:
    (line,) = host.proxies({"https_proxy": proxy})
    assert "...@proxy:3128" in line.what
    assert "secret" not in line.what
    assert "se/cr" not in line.what


def test_quotas(commands: FakeCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(commands.folder))
    assert [*quotas([])] == []
    table = "Disk quotas for user ann (uid 1):\\n Filesystem space quota\\n /home 3G 5G\\n"
    commands.add("quota", f"[ $1 = -q ] || printf '{table}'\n")
    monkeypatch.setenv("PATH", str(commands.folder) + ":/usr/bin:/bin")
    (line,) = quotas([])
    assert (line.level, line.what) == ("ok", "/home 3G 5G")
    commands.add("quota", "echo '/home: over block quota'\n")
    (line,) = quotas([])
    assert line.level == "warn"


def test_the_command_prints_all_sections(
    commands: FakeCommands,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An unreachable proxy keeps the test away from the real network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(commands.folder) + ":/usr/bin:/bin")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    commands.add("apptainer", APPTAINER.format(version="1.4.5", libexec="/none", seals=0))
    make_sif(tmp_path / "aiflux.sif", os_arch(), version="1", cpu_only="no")
    for name in ("sbatch", "squeue", "scancel"):
        commands.say(name)
    FakeSite().install(commands)
    monkeypatch.setenv("SLURM_PARTITION", "gpu")
    assert main(["doctor"]) == 0
    plain = capsys.readouterr().out
    assert "partition gpu: 1 node with 4 a100" in plain
    assert "\nNetwork\n" in plain
    assert "no failures" in plain
    assert "sealing: not tried: " in plain
    assert "exec" not in {call.argv[0] for call in commands.calls("apptainer")}, (
        "the image was only found"
    )
    assert main(["doctor", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {frozenset(line) for line in lines} == {frozenset({"name", "level", "what", "fix"})}
    (tmp_path / "aiflux.sif").write_bytes(b"")
    assert main(["doctor"]) == 2
    assert "FAIL image: " in capsys.readouterr().out


def test_amd_gpus_are_reported_with_what_containers_need(
    tmp_path: Path, commands: FakeCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values from marimo-team/marimo#9237; not tested on an AMD GPU."""
    card = '{"card0": {"GPU use (%)": "0", "Card Series": "Radeon RX 7900 XT"}}'
    commands.say("rocm-smi", card)
    monkeypatch.setenv("PATH", commands.path)
    dev, nodes, etc = tmp_path / "dev", tmp_path / "nodes", tmp_path / "etc"
    for folder in (dev, nodes / "0", nodes / "1", etc):
        folder.mkdir(parents=True)
    (nodes / "0" / "gpu_id").write_text("0\n")
    (nodes / "1" / "gpu_id").write_text("26967\n")
    settings = {"APPTAINER_CONFDIR": str(etc)}
    assert [*gpus({}, settings, dev, nodes)] == []
    (dev / "kfd").touch()
    (etc / "rocmliblist.conf").touch()
    (line,) = gpus({}, settings, dev, nodes)
    assert (line.level, line.what) == ("ok", "GPUs of AMD on this machine: 1 x Radeon RX 7900 XT")
    (etc / "rocmliblist.conf").unlink()
    (dev / "kfd").unlink()
    (dev / "kfd").symlink_to("/dev/absent")
    first, *rest = gpus({"AIFLUX_GPU_VENDOR": "amd"}, settings, dev, nodes)
    assert (first.level, [line.level for line in rest]) == ("ok", ["warn", "warn"])
    assert "/dev/kfd" in rest[0].what
    assert "--rocm does not work" in rest[1].what
