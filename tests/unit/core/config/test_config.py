"""Settings: their sources, and the errors of invalid ones."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SETTINGS, RunOptions, given_settings
from aiflux.engines.kinds import kind_named
from aiflux.errors import ConfigError, PreflightError, describe
from aiflux.slurm import SlurmRunner
from aiflux.slurm.script import job_directives
from aiflux.worker.main import make_parser
from tests.unit.command_line import parse


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
        ("slurm: [1]", "must contain KEY: VALUE"),
        ("[1]", "must contain KEY: VALUE"),
        ("a: b: c", "is not YAML"),
        ("[" * 5000, "is nested too deeply"),
        ('run:\n  stop: ["half \\ud83d"]', "line 2 is not YAML: a text contains half a character"),
        ("slurm: {gpus_per_node: two}", "a number of GPUs such as 2, or TYPE:NUMBER"),
        ("slurm: {mem: \u0663G}", "mem must be a memory size"),
        ("slurm: {sbatch_arg: {a: [1, 2]}}", "each VALUE a text or a number"),
        ("run: {engine_env: {FOO: }}", 'each with a VALUE; "" is an empty one'),
        ("run: {engine_arg: [a=1, a=2]}", "a is given twice: remove one"),
        ('slurm: {account: "a\\0b"}', "without control characters"),
        ("run: {request_timeout: inf}", "request_timeout must be a number of at least 0.1"),
        ("run: {request_timeout: 1e999}", "request_timeout must be a number of at least 0.1"),
    ],
)
def test_an_invalid_file_is_reported_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "aiflux.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config(tmp_path)
    assert words in f"{caught.value.message} {caught.value.remedy}"
    assert "aiflux.yaml" in caught.value.message


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("engine_env", ("FOO",), "KEY= sets an empty value"),
        ("engine_env", "FOO", "KEY= sets an empty value"),
        ("engine_env", ("=x",), "each with the name of a variable as KEY"),
        ("engine_env", ("--FOO=x",), "each with the name of a variable as KEY"),
        ("engine_env", {"FOO": None}, '"" is an empty one'),
        ("engine_env", {"A B": "x"}, "each with the name of a variable as KEY"),
        ("engine_env", ("A=1", "B=2", "A=1"), "A is given twice: remove one"),
        ("engine_arg", ("a-b=1", "a-b=2"), "a-b is given twice: remove one"),
        ("engine_arg", ("a_b=1", "--a-b"), "a-b is given twice: remove one"),
        ("engine_arg", "a=1 a=1", "a is given twice: remove one"),
        ("engine_arg", {"a_b": 1, "a-b": 1}, "a-b is given twice: remove one"),
        ("sbatch_arg", ("comment=x", "--comment=y"), "comment is given twice: remove one"),
        ("lora", ("a=/x", "a=/y"), "a is given twice: remove one"),
    ],
)
def test_a_key_needs_a_value_where_one_is_used_and_is_given_once(
    tmp_path: Path, name: str, given: Any, words: str
) -> None:
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"the argument {option}: {name} = ") as caught:
        config(tmp_path, arguments={name: given})
    assert words in str(caught.value.remedy)


@pytest.mark.parametrize("tokens", ["255", "2147483648"])
def test_a_context_that_no_server_takes_is_refused(tmp_path: Path, tokens: str) -> None:
    with pytest.raises(ConfigError, match=f"context_length = '{tokens}' is wrong"):
        config(tmp_path, arguments={"context_length": tokens})


def test_values_of_a_repeated_option_are_shown_as_they_were_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora = 'a=/x', 'b' is wrong"):
        config(tmp_path, arguments={"lora": ("a=/x", "b")})
    with pytest.raises(ConfigError, match=r"engine_arg = '' is wrong") as caught:
        config(tmp_path, arguments={"engine_arg": ("",)})
    assert caught.value.remedy == "engine_arg must be a text that is not empty"


def test_a_flag_an_empty_value_and_several_keys_are_accepted(tmp_path: Path) -> None:
    given = {"engine_env": ("A=", "B=x=y"), "sbatch_arg": ("exclusive", "comment=x")}
    found = config(tmp_path, arguments=given)
    assert found.get("engine_env") == {"A": "", "B": "x=y"}
    assert found.get("sbatch_arg") == {"exclusive": "", "comment": "x"}


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        (
            "slurm:\n  partition: gpu\n  acount: x\n",
            "line 3: unknown setting 'acount' in slurm",
            "did you mean 'account'? use one of: account, ",
        ),
        ("run:\nslrm:\n", "line 2: unknown section 'slrm'", "did you mean 'slurm'? use one of: "),
        (
            "slurm:\n  mem: lots\n",
            "line 2 (slurm.mem): mem = 'lots' is wrong",
            "mem must be a memory size such as 32G",
        ),
        ("run:\n\n\n  log_level: loud\n", "line 4 (run.log_level)", "DEBUG, INFO, WARNING or"),
        ("slurm:\n  mem: 1G\n  mem: 2G\n", "line 3: mem is given twice", "remove one of them"),
        ("slurm:\n  mem: [\n", "line 3 is not YAML", "correct it"),
        ("slurm:\n\tmem: 1G\n", "line 2 is not YAML", "indent with spaces, not tabs"),
        (
            "slurm:\n  memory: 1G\n  mem: 2G\n",
            "line 3 (slurm.mem): memory and mem are names of one setting, and both are given",
            "remove one of them",
        ),
        ("time: 1:00\n", "line 1: unknown section 'time'", "belongs to the section slurm: write"),
        (
            "run:\n  mem: 1G\n",
            "line 2: unknown setting 'mem' in run",
            "belongs to the section slurm",
        ),
        ("slurm:\n  modules: {a: b}\n", "line 2 (slurm.modules)", "must be a text"),
    ],
)
def test_an_error_names_the_line_and_the_allowed_values(
    tmp_path: Path, text: str, place: str, remedy: str
) -> None:
    (tmp_path / "aiflux.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config(tmp_path)
    assert f"{tmp_path / 'aiflux.yaml'}, {place}" in caught.value.message
    assert remedy in str(caught.value.remedy)


@pytest.mark.parametrize("setting", [item for item in SETTINGS if isinstance(item.default, bool)])
def test_an_argument_turns_a_setting_of_a_file_on_or_off(tmp_path: Path, setting: Setting) -> None:
    name = setting.name.replace("_", "-")
    for option, meant in ((f"--{name}", True), (f"--no-{name}", False)):
        word = str(not meant).lower()
        (tmp_path / "aiflux.yaml").write_text(f"{setting.section}: {{{setting.name}: {word}}}")
        assert config(tmp_path).get(setting.name) is not meant
        given = given_settings(parse(["run", "in.jsonl", option]).params)
        assert config(tmp_path, arguments=given).get(setting.name) is meant


@pytest.mark.parametrize(
    "setting", [item for item in SETTINGS if item.section not in ("slurm", "accounting")]
)
def test_the_worker_has_the_same_options(setting: Setting) -> None:
    words = [] if isinstance(setting.default, bool) else ["1"]
    text = ["1"] if setting.repeatable else "1"
    for option in setting.options:
        given = given_settings(vars(make_parser().parse_args([option, *words])))[setting.name]
        assert given == (text if words else not option.startswith("--no-"))


def test_the_worker_does_not_guess_an_option_either(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--sha", "1", "in.jsonl"])
    assert "--sha" in capsys.readouterr().err


def test_a_path_that_is_not_a_settings_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "aiflux.yaml"
    file.mkdir()
    with pytest.raises(ConfigError, match="is a directory, but should be a file"):
        config(tmp_path)
    file.rmdir()
    file.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="is a link to 'nowhere', which does not exist"):
        config(tmp_path)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        config(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="is not a regular file"):
        config(tmp_path)
    file.unlink()
    file.write_text("#" * (2 << 20))
    with pytest.raises(ConfigError, match="has 2 MB"):
        config(tmp_path)
    file.unlink()
    (tmp_path / ".env").mkdir()
    assert config(tmp_path).get("model") is None, "such folders are virtual environments"


def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "aiflux"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    folder.chmod(0)
    # Root may enter all the same, unless it gives that up.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    drop = drop if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-m", "aiflux.cli", "config", "show"],
        env={"HOME": str(tmp_path), "PATH": os.defpath}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    folder.chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert f"{folder / 'config.yaml'} cannot be read: Permission denied" in done.stderr


def test_a_deleted_current_directory_is_an_error(tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    lost.mkdir()
    command = 'rmdir "$PWD" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "aiflux.cli", "config", "show"],
        cwd=lost, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "the current directory cannot be used any more" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("MODEL_NAME='a", "the quote ' is not closed"),
        ('MODEL_NAME="a" b', "'b' follows the quotes"),
        ("MODEL_NAME='a'b", "'b' follows the quotes"),
    ],
)
def test_unbalanced_quotes_in_dotenv_are_an_error(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / ".env").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=f"line 2 .MODEL_NAME.: {words}"):
        config(tmp_path)


def test_paths_in_files_are_relative_to_the_file_and_can_contain_variables(tmp_path: Path) -> None:
    site, here = tmp_path / "site" / "s.yaml", tmp_path / "here"
    site.parent.mkdir()
    here.mkdir()
    environ = {"AIFLUX_SITE_CONFIG": str(site), "HOME": "/h", "USER": "ann", "SCRATCH": "/s c"}

    def models_dir() -> Path:
        return Config(environ=environ, directory=here).models_dir

    def written(path: str) -> Path:
        site.write_text(f"paths:\n  models_dir: {path}\n")
        return models_dir()

    assert written("models") == tmp_path / "site" / "models"
    assert written("/data/$USER/models") == Path("/data/ann/models")
    assert written("${SCRATCH}/m") == Path("/s c/m")
    assert written("/a$$USER/$(b)$") == Path("/a$USER/$(b)$")
    assert written("~/m") == Path("~/m").expanduser()
    (here / ".env").write_text("AIFLUX_MODELS_DIR=$SCRATCH/m\n")
    assert models_dir() == Path("/s c/m")
    environ["AIFLUX_MODELS_DIR"] = "/$USER"
    assert models_dir() == Path("/$USER"), "a shell has put in what it should"
    del environ["AIFLUX_MODELS_DIR"], environ["SCRATCH"]
    with pytest.raises(ConfigError, match=r"(?s)line 1 .*whose variables are set, but \$SCRATCH"):
        models_dir()
    (here / ".env").unlink()
    for wrong in ("''", "~nobody-of-that-name/m"):
        with pytest.raises(ConfigError, match=r"line 2 \(paths.models_dir\)"):
            written(wrong)


def test_an_invalid_line_of_dotenv_is_named(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("# mine\nSLURM_MEM=lots\n")
    with pytest.raises(ConfigError) as caught:
        config(tmp_path)
    assert caught.value.message == f"{dotenv}, line 2 (SLURM_MEM): mem = 'lots' is wrong"
    dotenv.write_text("SLURM_MEM\n")
    with pytest.raises(ConfigError, match="line 1: 'SLURM_MEM' is not KEY=VALUE"):
        config(tmp_path)
    dotenv.write_text("\ufeffSLURM_MEM=  # as it is\nTOP_P=0.5 # half\nMODEL_NAME='a #b'\n")
    values = config(tmp_path).values
    assert [values[name].value for name in ("mem", "top_p", "model")] == ["32G", 0.5, "a #b"]


def test_yaml_does_not_convert_values(tmp_path: Path) -> None:
    """YAML 1.1 would convert these values to 45000, False, 83, a date and a float."""
    (tmp_path / "aiflux.yaml").write_text(
        "slurm: {time: 12:30:00, partition: no, account: 0123, qos: 2026-01-01}\n"
        "run: {model: 1e3, max_tokens: 5, temperature: .5}\n"
    )
    found = config(tmp_path)
    slurm = found.get_slurm_config()
    assert (slurm.time, slurm.partition, slurm.account) == ("12:30:00", "no", "0123")
    assert (slurm.qos, found.get("model")) == ("2026-01-01", "1e3")
    assert (found.get("max_tokens"), found.get("temperature")) == (5, 0.5)


def test_every_environment_name_is_read(tmp_path: Path) -> None:
    texts = {"time": "1:00:00", "mem": "8G", "engine_url": "http://h:1", "log_level": "DEBUG",
             "top_p": "0.5", "engine": "ollama", "engine_command": "x {port}",
             "gpu_vendor": "amd", "lora": "a=/b", "too_long": "skip"}  # fmt: skip
    for setting in SETTINGS:
        if setting.env is None:
            continue
        text = texts.get(setting.name, "7" if setting.default is None else "1")
        found = Config(environ={"HOME": "/", setting.env: text}, directory=tmp_path)
        assert found.values[setting.name].origin == f"environment ({setting.env})"


def test_names_of_earlier_versions_work(tmp_path: Path) -> None:
    found = config(tmp_path, data_dir=tmp_path / "d", models_dir=str(tmp_path / "m"))
    assert found.models_dir == tmp_path / "m"
    assert found.containers_dir == tmp_path / "d" / "containers"
    slurm = found.get_slurm_config({"memory": "8g", "time": "00:10:00", "gpus_per_node": 2})
    assert (slurm.mem, slurm.memory, slurm.gpus_per_node) == ("8G", "8G", "2")
    slurm.account = "myaccount"
    assert slurm.checked().account == "myaccount"
    assert found.get_slurm_config({"account": None, "mem": None}) == found.get_slurm_config()
    with pytest.raises(ConfigError, match="unknown setting 'partitions'"):
        found.get_slurm_config({"partitions": "x"})


def test_slurm_settings_are_keywords() -> None:
    slurm = SlurmConfig(
        account="a", partition="p", nodes=1, gpus_per_node=2, time="1:00:00", memory="8gb",
        cpus_per_task="6",
    )  # fmt: skip
    assert (slurm.mem, slurm.memory, slurm.cpus_per_task) == ("8G", "8G", 6)
    slurm.memory = "16G"
    assert (slurm.mem, slurm.gpus_per_node) == ("16G", "2")
    assert SlurmConfig(mem=None).mem is None
    assert SlurmConfig(account=None, shards=None, sbatch_arg=None) == SlurmConfig()
    assert dataclasses.replace(slurm, mem="1G").memory == "1G"
    one, other = SlurmConfig(), SlurmConfig()
    one.sbatch_arg["comment"] = "x"
    assert other.sbatch_arg == {}


def test_resolved_values_do_not_change(tmp_path: Path) -> None:
    found = config(tmp_path)
    with pytest.raises(TypeError):
        found.values["account"] = found.values["qos"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.values["account"].value = "x"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.run_options().max_tokens = 5  # type: ignore[misc]
    changed = found.changed({"account": "mine", "qos": None})
    assert (changed.get("account"), found.get("account")) == ("mine", None)


def test_a_runner_accepts_a_config(tmp_path: Path) -> None:
    given = config(tmp_path, models_dir=tmp_path / "m", arguments={"account": "a"})
    runner = SlurmRunner(given, tmp_path)
    assert (runner.settings.models_dir, runner.config.account) == (tmp_path / "m", "a")


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


def test_a_python_error_shows_the_allowed_values() -> None:
    with pytest.raises(ConfigError) as caught:
        SlurmConfig(acount="x")
    assert "unknown setting 'acount'" in str(caught.value)
    assert "did you mean 'account'? use one of: account, " in str(caught.value)
    found = PreflightError("2 problems found", "fix them", ("1. this", "2. that"))
    shown = "".join(traceback.format_exception_only(found))
    assert shown.endswith("problems found\n  1. this\n  2. that\n  -> fix them\n")
    assert describe(found) == f"error: {found}"


def test_two_names_of_one_setting_cannot_be_combined(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mem and memory are names of one setting"):
        SlurmConfig(mem="1G", memory="2G")
    with pytest.raises(ConfigError, match="memory and mem are names of one setting"):
        config(tmp_path).get_slurm_config({"memory": "1G", "mem": "2G"})


def test_top_k_is_refused_where_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigError, match="top_k is set, but"):
        kind_named("ollama").refuse_run(RunOptions(top_k=5), {})
    kind_named("external").refuse_run(RunOptions(top_k=5, engine_url="http://h"), {})
    assert RunOptions(top_k=5, engine_url="http://h").parameters == {"top_k": 5}


def test_null_leaves_a_directive_out(tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text("slurm: {mem: null, time: null, account: null}\n")
    config = Config(directory=tmp_path, environ={"SLURM_ACCOUNT": "", "HOME": str(tmp_path)})
    asked = config.get_slurm_config()
    assert (asked.mem, asked.time, asked.account) == (None, None, None)
    directives = list(job_directives("a", asked.checked(), None))
    assert not [line for line in directives if "--mem" in line or "--time" in line]


def test_a_setting_is_declared_where_its_field_is() -> None:
    """Type, default, help and names of a setting are declared in its field only."""
    run = {item.name: item for item in dataclasses.fields(RunOptions)}
    slurm = {item.name: item for item in dataclasses.fields(SlurmConfig)}
    assert {name for name, item in run.items() if "setting" not in item.metadata} == {
        "model_defaults"  # computed from the catalog
    }
    assert all("setting" in item.metadata for item in slurm.values())
    for setting in SETTINGS:
        field = (run | slurm).get(setting.name)
        if field is not None and field.default is not dataclasses.MISSING:
            assert field.default == setting.default


@pytest.mark.parametrize("setting", [item for item in SETTINGS if item.repeatable])
def test_a_repeated_option_gives_all_its_values(tmp_path: Path, setting: Setting) -> None:
    words = ["run", "in.jsonl", setting.option, "A=/1", setting.option, "B=/2 3"]
    value = config(tmp_path, arguments=given_settings(parse(words).params)).get(setting.name)
    assert value in ({"A": "/1", "B": "/2 3"}, ("A=/1", "B=/2 3"))
    assert config(tmp_path, arguments=given_settings(parse(["run", "x"]).params)).get(
        setting.name
    ) == (setting.default)
