"""Promised names: each variable changes a run, and each option is a keyword."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.commands.run import run
from aiflux.core.config.config import Config
from aiflux.core.config.settings import BY_NAME, SETTINGS
from aiflux.errors import ConfigError
from aiflux.slurm import SlurmRunner
from aiflux.slurm.submit import plan_job
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import write_input

# The variables of the product's design, section 5.6, with a value for each and what it changes:
# a setting of the plan's options, a line of the job's script, or a path.
PROMISED: Mapping[str, tuple[str, str, Any]] = {
    "SLURM_ACCOUNT": ("proj", "script", "#SBATCH --account=proj\n"),
    "SLURM_PARTITION": ("gpuA100x4", "script", "#SBATCH --partition=gpuA100x4\n"),
    "SLURM_NODES": ("1", "script", "#SBATCH --nodes=1\n"),
    "SLURM_GPUS_PER_NODE": ("a100:2", "script", "#SBATCH --gpus-per-node=a100:2\n"),
    "SLURM_TIME": ("01:30:00", "script", "#SBATCH --time=01:30:00\n"),
    "SLURM_MEM": ("64G", "script", "#SBATCH --mem=64G\n"),
    "SLURM_CPUS_PER_TASK": ("16", "script", "#SBATCH --cpus-per-task=16\n"),
    "MODEL_NAME": ("gemma3:27b", "model", "gemma3:27b"),
    "AIFLUX_ENGINE": ("llamacpp", "engine", "llamacpp"),
    "BATCH_SIZE": ("7", "concurrency", 7),
    "SAVE_FREQUENCY": ("9", "save_frequency", 9),
    "MAX_RETRIES": ("11", "max_retries", 11),
    "RETRY_DELAY": ("2.5", "retry_delay", 2.5),
    "MAX_TOKENS": ("99", "max_tokens", 99),
    "TEMPERATURE": ("0.3", "temperature", 0.3),
    "TOP_P": ("0.4", "top_p", 0.4),
    "TOP_K": ("5", "top_k", 5),
    "AIFLUX_DATA_DIR": ("/d", "models_dir", "/d/models"),
    "AIFLUX_MODELS_DIR": ("/m", "models_dir", "/m"),
    "AIFLUX_LOGS_DIR": ("/l", "script", "#SBATCH --output=/l/slurm-%j.out\n"),
    "AIFLUX_CONTAINERS_DIR": ("FOLDER", "script", "\nimage=FOLDER/aiflux.sif\n"),
    "AIFLUX_IMAGE": ("FOLDER/aiflux.sif", "script", "\nimage=FOLDER/aiflux.sif\n"),
    "LOG_LEVEL": ("debug", "log_level", "DEBUG"),
}
# Only a server at an address has a top_k.
IN_ADDITION = {"TOP_K": {"AIFLUX_ENGINE_URL": "http://127.0.0.1:1"}}
# What a run needs that is no setting, and how Python names it; the rest does not submit a run.
KEYWORDS = {
    "input_argument": "input_path",
    "output": "output_path",
    "force": "force",
    "force_resume": "force_resume",
    "no_preflight": "preflight",
    "dry_run": "dry_run",
    "after": "after",
    "then": "then",
}
# What means nothing to Python: where a run works, and what is printed.
OF_THE_COMMAND_LINE = {"input_option", "as_json", "local", "pilot", "show_script"}


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes of Slurm's commands; a dry run needs no output of them."""
    fakes = FakeCommands(tmp_path / "bin")
    for name in ("scontrol", "squeue", "sacct"):
        fakes.say(name)
    monkeypatch.setenv("PATH", fakes.path)


def planned(folder: Path, environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the plan and the script of a dry run in an environment."""
    config = Config(environ={"HOME": str(folder), **environ}, directory=folder)
    # Where bodies name no model, the one of the run is taken.
    write_input(folder / "in.jsonl", 2, body={"messages": [{}]})
    options = config.run_options(model=None if "MODEL_NAME" in environ else "m:1")
    run = plan_job(
        config, config.get_slurm_config(), folder / "in.jsonl", folder / "out.json", options,
        cwd=folder, check=False, write=False,
    )  # fmt: skip
    return run.opened.plan.to_json(), run.script


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_variable_changes_the_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_sif(folder / "aiflux.sif", version="1", cpu_only="no")
    value, where, expected = PROMISED[name]
    value = value.replace("FOLDER", str(folder))
    fixed = dict(IN_ADDITION.get(name, {}))
    if name not in ("AIFLUX_IMAGE", "AIFLUX_CONTAINERS_DIR"):
        fixed["AIFLUX_IMAGE"] = str(folder / "aiflux.sif")
    plan, script = planned(tmp_path, {name: value, **fixed})
    if where == "script":
        assert str(expected).replace("FOLDER", str(folder)) in script
        return
    before, _ = planned(tmp_path, fixed)
    if where != "models_dir":
        plan, before = plan["options"], before["options"]
    assert plan[where] == expected != before[where]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", PROMISED)
def test_the_same_names_work_in_dotenv(name: str, tmp_path: Path) -> None:
    value, _, _ = PROMISED[name]
    (tmp_path / ".env").write_text(f"{name}={value}\n", encoding="utf-8")
    values = Config(environ={}, directory=tmp_path).values
    origins = {item.origin for item in values.values()} - {"default"}
    assert origins == {f"{tmp_path / '.env'}, line 1 ({name})"}


def test_more_than_one_node_is_refused(tmp_path: Path) -> None:
    config = Config(environ={"SLURM_NODES": "2"}, directory=tmp_path)
    with pytest.raises(ConfigError, match="nodes = 2: one job uses one node"):
        config.get_slurm_config().checked()


def test_no_promised_name_is_missing() -> None:
    assert set(PROMISED) <= {item.env for item in SETTINGS}


def options_of_run() -> set[str]:
    """Return the names of the options of ``aiflux run``."""
    return {param.name for param in run.params if param.name}


def test_python_accepts_every_option_of_the_command_line() -> None:
    settings = {item.name for item in SETTINGS if item.section != "accounting"}
    assert options_of_run() == settings | set(KEYWORDS) | OF_THE_COMMAND_LINE
    named = set(inspect.signature(SlurmRunner.run).parameters) - {"self", "options"}
    assert named == set(KEYWORDS.values()) | {"model_config"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_setting_is_a_keyword_and_checked(name: str, tmp_path: Path) -> None:
    """Each of its names is a keyword."""
    with pytest.raises(ConfigError, match=rf"\b{BY_NAME[name].name} = \[\{{\}}\] is wrong"):
        SlurmRunner(workspace=tmp_path).run("in.jsonl", **{name: [{}]})
