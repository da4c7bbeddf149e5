"""``aiflux config show`` and ``init``: what holds, where from, and a first file of it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SETTINGS
from aiflux.slurm.cluster import Facts, ask_cluster
from aiflux.slurm.config_template import Proposal, initial_file, propose
from aiflux.slurm.preflight.cluster import cluster_checks
from aiflux.slurm.preflight.local import collect
from aiflux.slurm.script import JobScript, render
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.fake_site import ACCOUNTING, FakeSite, node, partition
from tests.unit.terminals import on_terminal

SETTING = re.compile(r"^  (?:# )?([a-z0-9_]+):", re.MULTILINE)


@pytest.fixture
def commands(tmp_path: Path) -> FakeCommands:
    return FakeCommands(tmp_path / "fakes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user who has nothing configured."""
    path = tmp_path / "a b 'c' ü"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return path


def loaded(text: str, folder: Path) -> Config:
    (folder / "aiflux.yaml").write_text(text, encoding="utf-8")
    return Config(environ={"HOME": str(folder)}, directory=folder)


def chosen(commands: FakeCommands, site: FakeSite, folder: Path) -> tuple[dict[str, Any], str]:
    """Return what is proposed for a site, and the file; it loads and says just that."""
    facts = ask_cluster(site.install(commands))
    proposal = propose(facts)
    text = initial_file(facts, proposal)
    config = loaded(text, folder)
    for name, value in proposal.values.items():
        assert str(config.get(name)) == str(value)
        assert config.values[name].origin != "default"
    findings = collect(cluster_checks(facts, config.get_slurm_config().checked()))
    assert findings == proposal.findings
    return proposal.values, text


def test_the_first_partition_with_gpus_that_takes_the_user(
    commands: FakeCommands, folder: Path
) -> None:
    values, text = chosen(commands, FakeSite(), folder)
    assert values == {
        "partition": "gpu", "gpus_per_node": "1", "cpus_per_task": 4, "mem": "32G",
        "time": "04:00:00",
    }  # fmt: skip
    assert "#   big: 1 node with 8 a100; up to 2-00:00:00\n" in text
    assert "#   without GPUs: cpu\n" in text
    assert "#   with a type: a100:1, p4:1, v100:1\n" in text
    assert "#   nodes of gpu have: a100, amd\n" in text
    assert "#   partition gpu allows up to 1-00:00:00\n" in text
    assert "Slurm 23.11.4 of the cluster delta" in text


def test_the_default_partition_comes_first(commands: FakeCommands, folder: Path) -> None:
    site = FakeSite(partitions=[partition("gpu"), partition("big", Default="YES")])
    assert chosen(commands, site, folder)[0]["partition"] == "big"
    closed = partition("big", Default="YES", AllowAccounts="others")
    site = FakeSite(ACCOUNTING, partitions=[partition("gpu"), closed])
    assert chosen(commands, site, folder)[0]["partition"] == "gpu"


def test_an_account_is_named_only_where_it_has_to_be(commands: FakeCommands, folder: Path) -> None:
    site = FakeSite(ACCOUNTING)
    values, text = chosen(commands, site, folder)
    assert "account" not in values
    assert "#   yours: chem, physics; without one: physics\n" in text
    values, text = chosen(commands, FakeSite(ACCOUNTING, default_account=""), folder)
    assert values["account"] == "chem"
    assert "it has to be named" in text
    only = [partition("gpu", AllowAccounts="physics")]
    site = FakeSite(ACCOUNTING, partitions=only, default_account="chem")
    assert chosen(commands, site, folder)[0]["account"] == "physics"


def test_a_share_of_a_small_node(commands: FakeCommands, folder: Path) -> None:
    small = [node("g1", Gres="gpu:2", CPUTot="4", RealMemory="16000")]
    short = [partition("gpu", MaxTime="02:00:00", MaxMemPerNode="6000")]
    values, _ = chosen(commands, FakeSite(nodes=small, partitions=short), folder)
    assert (values["mem"], values["cpus_per_task"], values["time"]) == ("5G", 2, "02:00:00")


def test_a_cluster_that_does_not_count_memory(commands: FakeCommands, folder: Path) -> None:
    nodes = [node("g1", Gres="gpu:2", RealMemory="1")]
    values, text = chosen(commands, FakeSite(nodes=nodes), folder)
    assert values["mem"] is None
    assert "\n  mem: null\n" in text
    config = Config(environ={}, directory=folder)
    assert config.get_slurm_config().mem is None


def test_an_older_scheduler_has_gres_alone(commands: FakeCommands, folder: Path) -> None:
    values, _ = chosen(commands, FakeSite({"SelectType": "select/linear"}), folder)
    assert values["gres"] == "gpu:1"
    assert "gpus_per_node" not in values
    slurm = Config(environ={}, directory=folder).get_slurm_config()
    places = dict.fromkeys(("image", "input", "output_dir", "models_dir", "run_dir"), folder)
    script = render(JobScript(name="a", slurm=slurm, log=folder, **places))
    assert "#SBATCH --gres=gpu:1\n" in script
    assert "--gpus-per-node" not in script


def test_a_cluster_without_gpus(commands: FakeCommands, folder: Path) -> None:
    site = FakeSite(nodes=[node("c1", Partitions="cpu")], partitions=[partition("cpu")])
    values, _ = chosen(commands, site, folder)
    assert (values["partition"], values["gpus_per_node"]) == ("cpu", "0")


def test_what_stays_in_the_way_is_said_in_the_file(commands: FakeCommands, folder: Path) -> None:
    site = FakeSite(partitions=[partition("gpu", State="DRAIN")])
    values, text = chosen(commands, site, folder)
    assert values["partition"] == "gpu"
    assert "# PROBLEM: partition gpu is DRAIN: it accepts no jobs" in text


@pytest.mark.parametrize("with_slurm", [True, False])
def test_every_setting_is_there_and_may_be_taken_out_of_its_comment(
    commands: FakeCommands, folder: Path, with_slurm: bool
) -> None:
    facts = ask_cluster(FakeSite().install(commands)) if with_slurm else Facts()
    proposal = propose(facts)
    text = initial_file(facts, proposal)
    assert sorted(SETTING.findall(text)) == sorted(item.name for item in SETTINGS if item.offered)
    assert all(len(line) <= 100 and line == line.rstrip() for line in text.splitlines())
    assert loaded(text, folder).get("partition") == proposal.values.get("partition")
    opened = loaded(re.sub(r"^  # ([a-z_]+:)", r"  \1", text, flags=re.MULTILINE), folder)
    for item in SETTINGS:
        if item.name not in proposal.values and item.default is not None:
            assert opened.get(item.name) == item.default


def test_without_slurm_nothing_is_chosen_and_the_file_says_so(folder: Path) -> None:
    text = initial_file(Facts(), Proposal({}))
    assert "Slurm was missing, or did not answer" in text
    origins = {value.origin for value in loaded(text, folder).values.values()}
    assert origins == {"default"}


def test_init_writes_once(
    commands: FakeCommands,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", FakeSite().install(commands)["PATH"])
    assert main(["config", "init"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {folder / 'aiflux.yaml'}\n  partition: gpu, gpus_per_node: 1, " in printed
    written = (folder / "aiflux.yaml").read_text(encoding="utf-8")
    (folder / "aiflux.yaml").write_text("# mine\n", encoding="utf-8")
    assert main(["config", "init"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (folder / "aiflux.yaml").read_text(encoding="utf-8") == "# mine\n"
    assert main(["config", "init", "--force"]) == 0
    assert (folder / "aiflux.yaml").read_text(encoding="utf-8") == written
    capsys.readouterr()
    assert main(["config", "init", "--output", "-"]) == 0
    assert capsys.readouterr().out == written


def test_init_reports_an_image_that_does_not_fit_the_proposal(
    commands: FakeCommands,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", FakeSite().install(commands)["PATH"])
    make_sif(folder / "aiflux.sif", version="1", cpu_only="yes")
    assert main(["config", "init"]) == 0
    found = capsys.readouterr()
    assert "gpus_per_node: 1" in found.out
    assert "aiflux.sif has a CPU build of Ollama, but the job requests GPUs" in found.err
    assert "--gpus-per-node 0" in found.err


def test_init_for_all_folders_and_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert main(["config", "init", "--user"]) == 0
    assert (folder.parent / ".config/aiflux/config.yaml").is_file()
    assert (
        "Slurm is not available or did not respond: every setting has its default"
        in capsys.readouterr().out
    )
    assert main(["config", "init", "--output", "site.yaml"]) == 0
    assert (folder / "site.yaml").is_file()
    assert main(["config", "init", "--output", "none/site.yaml"]) == 2
    assert main(["config", "init", "--output", "."]) == 2
    printed = capsys.readouterr().err
    assert f"no such directory: {folder / 'none'}" in printed
    assert "is a directory" in printed


def test_show_tells_each_value_and_its_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "aiflux.yaml").write_text(
        'slurm:\n  mem: null\n  sbatch_arg: {comment: x}\nrun:\n  stop: ["\\n", "a, b", c d]\n'
    )
    (folder / ".env").write_text("\nTOP_P=0.5\n")
    monkeypatch.setenv("SLURM_ACCOUNT", "mine")
    assert main(["config", "show"]) == 0
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in
             capsys.readouterr().out.splitlines() if line.startswith("  ")}  # fmt: skip
    assert table["account"].split() == ["mine", "environment", "(SLURM_ACCOUNT)"]
    assert table["mem"].split() == ["-", "./aiflux.yaml,", "line", "2"]
    assert table["sbatch_arg"].split() == ["comment=x", "./aiflux.yaml,", "line", "3"]
    assert table["stop"].startswith(r'"\n", "a, b", c d '), "three texts"
    assert table["top_p"].split() == ["0.5", "./.env,", "line", "2", "(TOP_P)"]
    assert table["seal"].split() == ["true"]
    names = {item.name for item in SETTINGS if item.offered}
    assert names <= set(table)
    changed = [name for name in table if name in names][:5]
    assert {*changed} == {"account", "mem", "sbatch_arg", "stop", "top_p"}
    assert main(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["mem"]["value"] is None
    assert shown["settings"]["mem"]["from"] == f"{folder / 'aiflux.yaml'}, line 2"
    assert shown["settings"]["top_p"]["environment"] == "TOP_P"
    assert shown["models_dir"].endswith("/models")
    assert set(shown["settings"]) == {item.name for item in SETTINGS}


def test_show_fits_a_terminal_of_80_columns(folder: Path) -> None:
    environ = {
        "HOME": str(folder), "TERM": "xterm", "PATH": os.defpath, "LANG": "C.UTF-8",
        "AIFLUX_MODELS_DIR": "/a/very/long" * 10,
    }  # fmt: skip
    command = [sys.executable, "-m", "aiflux.cli", "config", "show"]
    shown = on_terminal(command, "stdin", "stdout", env=environ, cwd=folder)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.replace("\r\n", "\n")).splitlines()
    assert max(map(len, lines)) <= 80
    words = "".join(line[23:52].strip() for line in lines)
    assert environ["AIFLUX_MODELS_DIR"] in words


def test_the_limits_of_the_site_are_shown_with_their_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show"]) == 0
    assert "limits" not in capsys.readouterr().out
    file = folder.parent / "site.yaml"
    file.write_text("limits:\n  shards: 50\n  time: 1-00:00:00\n", encoding="utf-8")
    monkeypatch.setenv("AIFLUX_SITE_CONFIG", str(file))
    assert main(["config", "show"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    at = next(at for at, line in enumerate(lines) if line[:2] == ["limits", "of"])
    assert lines[at + 1 : at + 3] == [
        ["shards", "50", "~/site.yaml, line 2"], ["time", "1-00:00:00", "~/site.yaml, line 3"],
    ]  # fmt: skip
    assert main(["config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"] == {
        "shards": {"value": 50, "from": f"{file}, line 2"},
        "time": {"value": "1-00:00:00", "from": f"{file}, line 3"},
    }
