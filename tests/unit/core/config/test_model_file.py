"""Model files of earlier versions: their name and parameters, and a warning about the rest."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest

from aiflux.core.config.config import Config
from aiflux.core.config.sources import read_model_file
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.errors import ConfigError
from aiflux.slurm import SlurmRunner
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import write_input

EARLIER = """\
name: "llama3.2:3b"

resources:
  gpu_layers: 32
  gpu_memory: "16GB"
  batch_size: 8
  max_concurrent: 2

parameters:
  temperature: 0.7
  top_p: 0.9
  max_tokens: 2048
  top_k: 40
  stop_sequences: ["###", "\\n\\n"]

system:
  prompt: "You are a helpful assistant."

validation:
  temperature_range: [0.0, 1.0]
  max_tokens_limit: 4096
  batch_size_range: [1, 16]
  concurrent_range: [1, 4]

requirements:
  min_gpu_memory: "16GB"
  recommended_gpu: "A100"
  cuda_version: ">=12.0"
  cpu_cores: 4
  ram: "32GB"
"""


def config(folder: Path, **arguments: str) -> Config:
    return Config(environ={"HOME": str(folder)}, directory=folder, arguments=arguments)


def put(folder: Path, text: str = EARLIER, name: str = "models/llama3.2/3b.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("asked", [("llama3.2", "3b"), ("llama3.2:3b",)])
def test_name_and_parameters_are_read(tmp_path: Path, asked: tuple[str, ...]) -> None:
    path = put(tmp_path)
    found = config(tmp_path).load_model_config(*asked)
    assert (found.name, found.place) == ("llama3.2:3b", path)
    parameters = found.parameters
    assert (parameters.temperature, parameters.top_p, parameters.max_tokens) == (0.7, 0.9, 2048)
    assert (parameters.top_k, parameters.stop_sequences) == (40, ("###", "\n\n"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]


def test_keys_without_effect_are_named_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path)
    with caplog.at_level(logging.WARNING):
        config(tmp_path).load_model_config("llama3.2:3b")
    (record,) = caplog.records
    place, _, keys = record.getMessage().partition(": these keys have no effect: ")
    assert place.endswith("models/llama3.2/3b.yaml")
    named = [key.partition(" ")[0] for key in keys.split(", ") if not key.startswith("whose")]
    assert named == ["resources", "system", "validation", "requirements", "parameters.top_k"]


def test_the_example_in_the_documentation_is_read(tmp_path: Path) -> None:
    page = Path(__file__).parents[4] / "docs" / "configuration.md"
    (block,) = re.findall(r"^```\n(name: .*?)^```", page.read_text("utf-8"), re.M | re.S)
    found = read_model_file(put(tmp_path, block))
    assert found.parameters.settings() == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 2048, "stop": ("###",),
    }  # fmt: skip
    assert found.unused == ("resources", "system", "validation", "requirements")


def test_files_are_found_in_the_current_and_the_models_directory(tmp_path: Path) -> None:
    only = "parameters: {max_tokens: 5}"
    models = tmp_path / ".local/share/aiflux/models"
    put(models, only, "phi3/mini.yaml")
    found = config(tmp_path).load_model_config("phi3", "mini")
    assert (found.name, found.parameters.max_tokens) == ("phi3:mini", 5)
    put(tmp_path, "parameters: {max_tokens: 6}", "config/models/phi3/mini.yaml")
    assert config(tmp_path).load_model_config("phi3:mini").parameters.max_tokens == 6
    put(tmp_path, "parameters: {max_tokens: 7}", "models/mistral-small/default.yaml")
    assert config(tmp_path).load_model_config("mistral-small").parameters.max_tokens == 7
    own = put(tmp_path, "parameters: {max_tokens: 8}", "mine.yaml")
    custom = config(tmp_path).load_model_config("phi3", "mini", custom_config_path="mine.yaml")
    assert (custom.place, custom.parameters.max_tokens) == (own, 8)


def test_one_of_several_models_in_a_file_is_chosen_by_key_or_name(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "models:\n  Llama-3.2-3B-Instruct:\n    name: llama3.2:3b\n    hf_name: meta/Llama\n"
        "    parameters: {temperature: 0.7}\n  Other: {name: 'other:1b'}\n",
        "models.yaml",
    )
    found = read_model_file(path, "Llama-3.2-3B-Instruct")
    assert (found.name, found.parameters.temperature) == ("llama3.2:3b", 0.7)
    assert found.unused == ("hf_name",)
    for name, words in (("Nope", "no model 'Nope'"), (None, "several models")):
        with pytest.raises(ConfigError, match=words) as caught:
            read_model_file(path, name)
        assert "Llama-3.2-3B-Instruct, Other" in str(caught.value.remedy)
    assert read_model_file(path, among="llama3.2:3b") == found
    assert read_model_file(path, among="Other").name == "other:1b"
    own = config(tmp_path, model_config=str(path), model="llama3.2:3b")
    assert own.get("temperature") == 0.7
    put(tmp_path, "models: {'phi3:mini': {parameters: {top_p: 0.5}}}", "models.yaml")
    assert read_model_file(path).name == "phi3:mini"


def test_without_a_file_the_parameters_are_those_of_the_catalog(tmp_path: Path) -> None:
    place = tmp_path / ".config/aiflux/models.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("models: {'phi4:14b': {defaults: {temperature: 0.125, stop: '###'}}}\n")
    found = config(tmp_path).load_model_config("phi4:14b")
    assert (found.parameters.temperature, found.parameters.stop_sequences) == (0.125, ("###",))
    assert found.place is None
    unknown = config(tmp_path).load_model_config("nobody/knows:1b")
    assert (unknown.name, unknown.parameters.settings()) == ("nobody/knows:1b", {})


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        (
            "parameters:\n  temperature: hot",
            "line 2 (parameters.temperature): temperature = 'hot' is wrong",
            "temperature must be a number of at least 0 and at most 100",
        ),
        (
            "parameters:\n  top_pp: 1",
            "line 2: unknown key 'top_pp' in parameters",
            "did you mean 'top_p'?",
        ),
        ("name: NA", "line 1 (name): the model has no name in Ollama", "--engine-url"),
        ("name: ' a b'", "line 1 (name): model ' a b' is not a model name", "NAME:TAG"),
        ("parameters: 3", "(parameters) must contain KEY: VALUE lines", "top_p"),
    ],
)
def test_an_invalid_file_is_reported_with_its_place(
    tmp_path: Path, text: str, place: str, remedy: str
) -> None:
    path = put(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_model_file(path)
    assert str(path) in caught.value.message
    assert place in caught.value.message
    assert remedy in str(caught.value.remedy)


@pytest.fixture
def workspace(awkward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("sbatch", "42\n")
    for silent in ("scontrol", "squeue", "sacct"):
        fakes.say(silent)
    monkeypatch.setenv("PATH", fakes.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_input(awkward / "in.jsonl", 2, body={"messages": [{}]})
    make_sif(awkward / "aiflux.sif", version="1", cpu_only="no")
    return awkward


def test_a_run_uses_the_parameters_of_its_model_configuration(workspace: Path) -> None:
    put(workspace)
    runner = SlurmRunner(workspace=workspace)
    model = runner.settings.load_model_config("llama3.2", "3b")
    runner.run("in.jsonl", "out.json", model_config=model, temperature=0.25)
    run = RunDirectory.of_output(workspace / "out.json")
    plan = read_plan(run)
    assert plan.options.model == "llama3.2:3b"
    # What is given to run() wins; Ollama has no top_k, a server at an address may.
    assert plan.options.parameters == {
        "max_tokens": 2048, "temperature": 0.25, "top_p": 0.9, "stop": ["###", "\n\n"],
    }  # fmt: skip
    assert json.loads(run.plan.read_text())["options"]["stop"] == ["###", "\n\n"]


def test_a_run_accepts_the_path_of_a_model_file(workspace: Path, tmp_path: Path) -> None:
    put(workspace)
    (workspace / ".env").write_text("MAX_TOKENS=7\n")
    where = "models/llama3.2/3b.yaml"
    runner = SlurmRunner(workspace=workspace)
    runner.run(
        "in.jsonl", "out.json", model_config=where, engine_url="http://h:1", gpus_per_node="0"
    )
    options = read_plan(RunDirectory.of_output(workspace / "out.json")).options
    assert (options.max_tokens, options.top_k) == (7, 40)
    (workspace / "aiflux.yaml").write_text(f"run: {{model_config: '{put(tmp_path)}'}}\n")
    values = Config(directory=workspace, environ={}).values
    assert values["top_p"].origin == str(tmp_path / where)
    assert values["max_tokens"].origin == f"{workspace / '.env'}, line 1 (MAX_TOKENS)"


@pytest.mark.parametrize(("engine", "top_k"), [("ollama", None), ("llamacpp", 40)])
def test_the_engine_decides_whether_top_k_is_used(
    workspace: Path, tmp_path: Path, engine: str, top_k: int | None
) -> None:
    given = {"model_config": put(tmp_path), "engine": engine}
    assert Config(arguments=given, directory=workspace, environ={}).get("top_k") == top_k


def test_another_model_s_parameters_are_refused(workspace: Path) -> None:
    put(workspace)
    with pytest.raises(ConfigError, match=r"is for the model llama3\.2:3b, but the run's model is"):
        SlurmRunner(workspace=workspace).run(
            "in.jsonl", model="other:1b", model_config="models/llama3.2/3b.yaml"
        )
