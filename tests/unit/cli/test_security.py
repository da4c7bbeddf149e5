"""What ``docs/security.md`` promises of the current directory's files."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SETTINGS
from aiflux.errors import ConfigError
from aiflux.image.container import local_choices
from aiflux.slurm import SlurmRunner
from aiflux.worker import main as worker
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import write_input

DECISIVE = {
    "engine_ca": "ca.pem",
    "engine_url": "http://h:1", "engine_env": "{LD_PRELOAD: x}", "image": "x.sif",
    "engine_arg": "{middleware: x}", "engine_command": "'serve --port {port}'",
    "containers_dir": "c", "data_dir": "d", "models_dir": "m", "modules": "[x]",
    "setup": "['curl x | sh']", "sbatch_arg": "{comment: x}", "seal": "false",
}  # fmt: skip
ENVIRONMENT = {item.env: item for item in SETTINGS if item.decisive and item.env}


def section(name: str) -> str:
    return next(item.section for item in SETTINGS if item.name == name)


def config(folder: Path, **environ: str) -> Config:
    return Config(environ={"HOME": str(folder / "home"), **environ}, directory=folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "in.jsonl", 2)
    return tmp_path


def user_file(folder: Path) -> Path:
    path = folder / "home" / ".config" / "aiflux" / "config.yaml"
    path.parent.mkdir(parents=True)
    return path


# --- one line ---------------------------------------------------------------------------------


def test_the_settings_that_decide_are_known() -> None:
    assert {item.name for item in SETTINGS if item.decisive} == {*DECISIVE}
    text = (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in DECISIVE)


@pytest.mark.parametrize("name", DECISIVE)
def test_a_file_of_the_folder_that_decides_is_named(place: Path, name: str) -> None:
    text = f"{section(name)}: {{{name}: {DECISIVE[name]}}}\n"
    (place / "aiflux.yaml").write_text(text, encoding="utf-8")
    line = local_choices(config(place), None)
    assert line is not None
    assert f"{name} = " in line
    assert f"{place / 'aiflux.yaml'}, line 1" in line
    assert "\n" not in line
    user_file(place).write_text(text, encoding="utf-8")
    (place / "aiflux.yaml").unlink()
    assert local_choices(config(place), None) is None, "the user's own file"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_dotenv_is_named_and_the_environment_is_not(place: Path, name: str) -> None:
    values = {"AIFLUX_SEAL": "no", "AIFLUX_ENGINE_ARG": "a=b", "AIFLUX_ENGINE_COMMAND": "x {port}"}
    value = values.get(name, "http://h:1")
    (place / ".env").write_text(f"{name}={value}\n", encoding="utf-8")
    line = local_choices(config(place), None)
    assert line is not None
    assert f"{ENVIRONMENT[name].name} = " in line
    assert local_choices(config(place, **{name: value}), None) is None


def test_other_settings_of_the_folder_need_no_line(place: Path) -> None:
    (place / "aiflux.yaml").write_text("slurm: {account: a, partition: gpu, seal: true}\n")
    assert local_choices(config(place), None) is None


def test_a_line_holds_no_control_characters(place: Path) -> None:
    text = 'paths: {image: "x\\x9b2J.sif"}\n'
    (place / "aiflux.yaml").write_text(text, encoding="utf-8")
    assert str(local_choices(config(place), None)).isprintable()


def test_an_image_that_was_only_found_is_named(place: Path) -> None:
    image = make_sif(place / "aiflux.sif", version="1")
    assert f"image = {image} (found here)" in str(local_choices(config(place), image))
    assert local_choices(config(place, AIFLUX_IMAGE=str(image)), image) is None


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    return waiting_slurm(tmp_path / "bin", monkeypatch)


def test_the_line_comes_before_the_job_and_from_every_way_to_start_one(
    place: Path, slurm: FakeCommands, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    make_sif(place / "aiflux.sif", version="1")
    (place / "aiflux.yaml").write_text("slurm: {setup: [true]}\n", encoding="utf-8")
    # sbatch fails; the messages came before that.
    slurm.say("sbatch", status=1)
    words = ["--model", "m:1", "--input", "in.jsonl", "--no-preflight"]
    for command in (["run"], ["run", "--dry-run"], ["estimate"]):
        main([*command, *words])
        printed = capsys.readouterr().err
        assert "note: the current directory decides: setup = ('true',)" in printed
        assert f"image = {place / 'aiflux.sif'}" in printed
    SlurmRunner().run("in.jsonl", "out.json", model="m:1", preflight=False, dry_run=True)
    assert "the current directory decides: setup" in caplog.text


# --- the key ----------------------------------------------------------------------------------


def of_yaml(place: Path, url: str) -> None:
    (place / "aiflux.yaml").write_text(f"run: {{engine_url: {url!r}}}\n", encoding="utf-8")


def of_dotenv(place: Path, url: str) -> None:
    (place / ".env").write_text(f"AIFLUX_ENGINE_URL={url}\n", encoding="utf-8")


@pytest.mark.parametrize("write", [of_yaml, of_dotenv])
@pytest.mark.parametrize(
    "start",
    [
        lambda: main(["run", "--input", "in.jsonl", "--output", "o.json"]),
        lambda: main(["run", "--input", "in.jsonl", "--output", "o.json", "--dry-run"]),
        lambda: main(["run", "--input", "in.jsonl", "--output", "o.json", "--pilot", "20"]),
        lambda: main(["estimate", "--input", "in.jsonl", "--output", "o.json"]),
        lambda: worker.main(["in.jsonl", "o.json"]),
    ],
    ids=["run", "dry run", "pilot", "estimate", "worker"],
)
def test_the_key_does_not_go_where_only_the_folder_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    write: Callable[[Path, str], None], start: Callable[[], int],
) -> None:  # fmt: skip
    monkeypatch.setenv("AIFLUX_API_KEY", "sk-secret")
    with FaultyEngine() as engine:
        write(place, engine.url)
        assert start() == 2
        printed = capsys.readouterr().err
        assert f"AIFLUX_API_KEY would go to {engine.url}" in printed
        assert "--engine-url" in printed
        assert engine.headers == []
    assert not (place / "o.json.aiflux").exists()


def test_the_key_does_not_go_there_from_python_either(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIFLUX_API_KEY", "sk-secret")
    of_yaml(place, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="AIFLUX_API_KEY would go to"):
        SlurmRunner().run("in.jsonl", preflight=False)
    config(place, AIFLUX_API_KEY="k").run_options(engine_url="http://h:2")


@pytest.mark.parametrize("name", ["aiflux.yaml", ".env"])
def test_certificates_of_a_file_of_this_directory_get_no_key(place: Path, name: str) -> None:
    written = {"aiflux.yaml": "run:\n  engine_ca: ca.pem\n", ".env": "AIFLUX_ENGINE_CA=ca.pem\n"}
    (place / name).write_text(written[name], encoding="utf-8")
    (place / "ca.pem").touch()
    assert "engine_ca" in config(place).decided_here
    with_key = config(place, AIFLUX_API_KEY="k")
    with pytest.raises(ConfigError, match=r"only trusted because .* names the certificates") as no:
        with_key.run_options(engine_url="https://h:2")
    assert "--engine-ca" in str(no.value.remedy)
    confirmed = with_key.run_options(engine_url="https://h:2", engine_ca=str(place / "ca.pem"))
    assert confirmed.engine_ca == str(place / "ca.pem")


@pytest.mark.parametrize("how", ["argument", "environment", "user's file", "site's file", "no key"])
def test_an_address_that_was_confirmed_gets_the_key(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    more = []
    if how != "no key":
        monkeypatch.setenv("AIFLUX_API_KEY", "sk-secret")
    with FaultyEngine() as engine:
        of_yaml(place, engine.url)
        if how == "argument":
            more = ["--engine-url", engine.url]
        elif how == "environment":
            monkeypatch.setenv("AIFLUX_ENGINE_URL", engine.url)
        elif how == "user's file":
            (place / "aiflux.yaml").rename(user_file(place))
        elif how == "site's file":
            monkeypatch.setenv("AIFLUX_SITE_CONFIG", str(place / "aiflux.yaml"))
        assert main(["run", "--input", "in.jsonl", "--output", "o.json", *more]) == 0
        printed = capsys.readouterr().err
        assert ("note: the current directory decides: engine_url = " in printed) is (
            how == "no key"
        )
        keys = {headers.get("Authorization") for headers in engine.headers}
    assert keys == ({None} if how == "no key" else {"Bearer sk-secret"})


# --- files of others --------------------------------------------------------------------------

FILES = {"aiflux.yaml": "run: {model: m:1}\n", ".env": "MODEL_NAME=m:1\n"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("mode", "words"), [(0o646, "everyone"), (0o602, "everyone")])
def test_a_file_that_others_can_write_is_refused(
    place: Path, name: str, mode: int, words: str
) -> None:
    (place / name).write_text(FILES[name], encoding="utf-8")
    (place / name).chmod(0o644)
    assert config(place).get("model") == "m:1"
    (place / name).chmod(mode)
    with pytest.raises(ConfigError, match=f"is refused: {words} can write to it") as caught:
        config(place)
    assert "chmod go-w" in str(caught.value.remedy)
    assert main(["config", "show"]) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_is_refused(place: Path, name: str) -> None:
    (place / name).write_text(FILES[name], encoding="utf-8")
    os.chown(place / name, 12345, -1)
    with pytest.raises(ConfigError, match="is refused: it belongs to user 12345"):
        config(place)
    os.chown(place / name, 0, 12345)
    (place / name).chmod(0o664)
    with pytest.raises(ConfigError, match="is refused: the group 12345 can write to it"):
        config(place)
    # A link that somebody else laid leads to whichever file of yours suits them.
    (place / name).chmod(0o644)
    (place / name).rename(place / "mine")
    (place / name).symlink_to(place / "mine")
    assert config(place).get("model") == "m:1"
    os.lchown(place / name, 12345, -1)
    with pytest.raises(ConfigError, match="it belongs to user 12345"):
        config(place)


def test_a_group_of_one_is_nobody_else(place: Path) -> None:
    """Systems with a group for each user make files that this group can write to (umask 002)."""
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    if (group.gr_name, *group.gr_mem) not in ((user.pw_name,), (user.pw_name, user.pw_name)):
        pytest.skip(f"{user.pw_name} has no group of its own here")
    path = place / "aiflux.yaml"
    path.write_text(FILES["aiflux.yaml"], encoding="utf-8")
    os.chown(path, -1, group.gr_gid)
    path.chmod(0o664)
    assert config(place).get("model") == "m:1"


def test_a_shared_file_can_be_trusted_by_name(place: Path) -> None:
    path = place / "aiflux.yaml"
    path.write_text("slurm: {setup: [true]}\n", encoding="utf-8")
    path.chmod(0o666)
    trusted = config(place, AIFLUX_SITE_CONFIG=str(path))
    assert trusted.get("setup") == ("true",)
    assert local_choices(trusted, None) is None


def test_a_dotenv_of_another_program_is_no_concern(place: Path) -> None:
    (place / ".env").write_text("DATABASE_URL=postgres://x\n", encoding="utf-8")
    (place / ".env").chmod(0o666)
    assert config(place).get("model") is None


def test_the_file_that_config_init_writes_is_taken(place: Path, slurm: FakeCommands) -> None:
    assert main(["config", "init"]) == 0
    assert local_choices(config(place), None) is None
    old = os.umask(0o022)
    try:
        assert main(["config", "show"]) == 0
    finally:
        os.umask(old)
