"""Settings: where they come from, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiflux.core.config import Config, SlurmConfig
from aiflux.core.options import RunOptions
from aiflux.core.settings import SETTINGS
from aiflux.errors import ConfigError
from aiflux.slurm.directives import job_directives


def config(directory: Path, **more: object) -> Config:
    return Config(environ={"HOME": str(directory)}, directory=directory, **more)  # type: ignore[arg-type]


def test_each_source_wins_over_the_next(tmp_path: Path) -> None:
    user = tmp_path / ".config" / "aiflux"
    user.mkdir(parents=True)
    site = tmp_path / "site.yaml"
    environ = {"HOME": str(tmp_path), "AIFLUX_SITE_CONFIG": str(site)}

    def account(**more: object) -> tuple[object, str]:
        found = Config(environ=environ, directory=tmp_path, **more).values["account"]  # type: ignore[arg-type]
        return found.value, found.origin

    site.write_text("slurm: {account: site}")
    assert account() == ("site", f"{site}, line 1")
    (user / "config.yaml").write_text("slurm: {account: user}")
    assert account()[0] == "user"
    (tmp_path / "aiflux.yaml").write_text("slurm: {account: project}")
    assert account()[0] == "project"
    (tmp_path / ".env").write_text("# comment\nexport SLURM_ACCOUNT='dot env' # why\n")
    assert account()[0] == "dot env"
    environ["SLURM_ACCOUNT"] = "environment"
    assert account() == ("environment", "environment (SLURM_ACCOUNT)")
    assert account(arguments={"account": "argument"}) == ("argument", "argument")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm: {acount: x}", "unknown setting 'acount'"),
        ("slrum: {account: x}", "unknown section 'slrum'"),
        ("run: {concurrency: 0}", "concurrency must be a whole number of at least 1"),
        ("run: {max_failures: many}", "max_failures must be"),
        ("slurm: {mem: lots}", "mem must be a memory size"),
        ("slurm: {time: soon}", "time must be a Slurm time"),
        ("slurm: [1]", "must hold KEY: VALUE"),
        ("[1]", "must hold KEY: VALUE"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "aiflux.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config(tmp_path)
    assert words in f"{caught.value.message} {caught.value.remedy}"
    assert "aiflux.yaml" in caught.value.message


def test_every_environment_name_is_read(tmp_path: Path) -> None:
    texts = {"time": "1:00:00", "mem": "8G", "engine_url": "http://h:1", "log_level": "DEBUG",
             "top_p": "0.5"}  # fmt: skip
    for setting in SETTINGS:
        if setting.env is None:
            continue
        text = texts.get(setting.name, "7" if setting.default is None else "1")
        found = Config(environ={"HOME": "/", setting.env: text}, directory=tmp_path)
        assert found.values[setting.name].origin == f"environment ({setting.env})"


def test_old_habits_keep_working(tmp_path: Path) -> None:
    found = config(tmp_path, data_dir=tmp_path / "d", models_dir=str(tmp_path / "m"))
    assert found.models_dir == tmp_path / "m"
    assert found.containers_dir == tmp_path / "d" / "containers"
    slurm = found.get_slurm_config({"memory": "8g", "time": "00:10:00", "gpus_per_node": 2})
    assert (slurm.mem, slurm.memory, slurm.gpus_per_node) == ("8G", "8G", "2")
    slurm.account = "myaccount"
    assert slurm.checked().account == "myaccount"
    with pytest.raises(ConfigError, match="unknown setting 'partitions'"):
        found.get_slurm_config({"partitions": "x"})


def test_a_value_is_checked_when_it_is_given() -> None:
    with pytest.raises(ConfigError, match="SlurmConfig: cpus_per_task = 0 is wrong"):
        SlurmConfig(cpus_per_task=0)
    slurm = SlurmConfig()
    with pytest.raises(ConfigError, match="SlurmConfig: time = 'soon' is wrong"):
        slurm.time = "soon"
    with pytest.raises(ConfigError, match="unknown setting 'acount'") as caught:
        slurm.acount = "mine"
    assert "did you mean 'account'?" in str(caught.value.remedy)
    with pytest.raises(ConfigError, match="one job uses one node"):
        SlurmConfig(nodes=2).checked()


def test_top_k_is_refused_where_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigError, match="top_k is set, but"):
        RunOptions(top_k=5)
    assert RunOptions(top_k=5, engine_url="http://h").parameters == {"top_k": 5}


def test_null_leaves_a_directive_out(tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text("slurm: {mem: null, time: null, account: null}\n")
    config = Config(directory=tmp_path, environ={"SLURM_ACCOUNT": "", "HOME": str(tmp_path)})
    asked = config.get_slurm_config()
    assert (asked.mem, asked.time, asked.account) == (None, None, None)
    directives = list(job_directives("a", asked.checked(), None))
    assert not [line for line in directives if "--mem" in line or "--time" in line]
