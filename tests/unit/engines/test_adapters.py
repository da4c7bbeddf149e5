"""LoRA adapters: requests name them, and each result says which one answered."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SlurmConfig
from aiflux.core.runs.plan import Adapter, Plan
from aiflux.engines.kinds import kind_named
from aiflux.engines.vllm.adapter import adapter_words, read_adapter
from aiflux.errors import (
    AifluxError,
    ConfigError,
    ExitCode,
    InputError,
    ModelError,
    RunConflictError,
)
from aiflux.slurm.preflight.local import check_fields
from aiflux.slurm.script import JobScript
from tests.tools import make_tiny_gguf
from tests.tools.engine_contract import ProgramSite
from tests.tools.make_adapters import gguf_adapter, put_peft
from tests.unit.engines.test_contract import FakeLlamaServer, FakeVllm
from tests.unit.helpers import logged_command, request_line
from tests.unit.made_snapshots import LLAMA, put_folder
from tests.unit.working import Working

SITES = {"vllm": FakeVllm, "llamacpp": FakeLlamaServer}


def put(engine: str, folder: Path, name: str, seed: int = 1, **more: Any) -> Path:
    """Write an adapter for the model of an engine's stand-in."""
    if engine == "vllm":
        return put_peft(folder / name, LLAMA, seed=seed, **more)
    path = folder / f"{name}.gguf"
    path.write_bytes(gguf_adapter(seed=seed))
    return path


class Adapted(Working):
    """A run with the adapters ``formal`` and ``funny``, on an engine's stand-in."""

    def __init__(self, folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
        site = SITES[engine](folder)
        assert isinstance(site, ProgramSite)
        self.site, self.engine = site, engine
        self.folder = folder
        adapters = {name: str(put(engine, folder, name, seed))
                    for seed, name in enumerate(("formal", "funny"))}  # fmt: skip
        super().__init__(folder, None, models_dir=site.models_dir, engine=engine, slots=2,
                         model=site.model, lora=adapters)  # fmt: skip
        monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(site.program))
        monkeypatch.setenv("AIFLUX_ENGINE", engine)

    def asks(self, *models: str | None) -> Adapted:
        """Write one request for each model."""
        lines = [request_line(f"r{at}", body={"model": model, "messages": [
            {"role": "user", "content": f"hello {at}"}]})
            for at, model in enumerate(models)]  # fmt: skip
        self.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self

    def plan(self) -> Plan:
        return self.open().plan

    def starts(self) -> int:
        return len(self.site.started())


@pytest.fixture(params=SITES)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapted:
    return Adapted(tmp_path, request.param, monkeypatch)


def vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Adapted:
    return Adapted(folder, "vllm", monkeypatch)


def test_requests_choose_an_adapter_or_the_model_in_one_engine(run: Adapted) -> None:
    model = kind_named(run.engine).served_name(run.site.model)
    run.asks("funny", None, "formal", model, "funny")
    assert run.run() is ExitCode.OK, run.error
    texts = [each["output"]["choices"][0]["message"]["content"] for each in run.results]
    assert texts == [
        "funny: hello 0", "hello 1", "formal: hello 2", "hello 3", "funny: hello 4"]  # fmt: skip
    assert run.starts() == 1
    digests = run.plan().adapter_digests
    found = [(each["metadata"]["model"], each["metadata"].get("adapter_digest"))
             for each in run.results]  # fmt: skip
    funny, formal = ("funny", digests["funny"]), ("formal", digests["formal"])
    assert found == [funny, (model, None), formal, (model, None), funny]
    assert len(digests["funny"]) == 64


def test_vllm_gets_rank_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = vllm(tmp_path, monkeypatch)
    odd = put("vllm", tmp_path, "a, b=c", rank=12)
    run.options["lora"] = {"x, y": str(odd), **run.options["lora"]}
    run.asks("x, y")
    assert run.run() is ExitCode.OK, run.error
    words = logged_command(next((tmp_path / "out.json.aiflux" / "logs").glob("engine*")))
    at = words.index("--enable-lora")
    assert words[at : at + 5] == ["--enable-lora", "--max-lora-rank=16", "--max-loras=4",
                                  "--max-cpu-loras=4", "--lora-modules"]  # fmt: skip
    assert [json.loads(each)["name"] for each in words[at + 5 :]] == ["x, y", "formal", "funny"]
    assert json.loads(words[at + 5])["path"] == str(odd)


def test_gpus_have_room_for_eight_adapters_at_once_and_a_cpu_for_one_more_than_all() -> None:
    """On a CPU, vLLM takes the last place for that of requests without an adapter."""
    ten = [Adapter(f"a{at}", f"/a{at}", "d", 8) for at in range(10)]
    gpus, cpu = (adapter_words(ten, "m", on_gpus=on_gpus) for on_gpus in (True, False))
    assert gpus[2:4] == ["--max-loras=8", "--max-cpu-loras=10"]
    assert cpu[2:4] == ["--max-loras=11", "--max-cpu-loras=11"]


def test_a_name_that_is_neither_model_nor_adapter_is_an_input_error(run: Adapted) -> None:
    run.asks("formal", "polite")
    with pytest.raises(InputError) as caught:
        run.open()
    assert 'line 2: body.model is "polite"' in caught.value.problems[0]


def test_the_model_may_be_named_by_requests_only(run: Adapted) -> None:
    name = kind_named(run.engine).served_name(run.site.model)
    run.options["model"] = None
    run.asks("formal", name)
    assert kind_named(run.engine).same_model(run.plan().models[0], name)
    with pytest.raises(InputError, match="no request names a model"):
        run.asks("formal").open()
    with pytest.raises(InputError, match="--lora needs a run with one model"):
        run.asks("formal", name, "org/other" if run.engine == "vllm" else "other:1b").open()


def test_an_adapter_with_a_name_of_the_model_is_refused(run: Adapted) -> None:
    name = kind_named(run.engine).served_name(run.site.model)
    run.options["lora"] = {name: next(iter(run.options["lora"].values()))}
    with pytest.raises(ConfigError, match="has a name of the model"):
        run.asks(None).open()


def test_a_changed_adapter_is_noticed_on_resume_and_by_a_job(run: Adapted) -> None:
    run.asks("formal", "funny").open()
    put(run.engine, run.folder, "funny", seed=7)
    assert run.shard(0) is ExitCode.ENGINE
    assert isinstance(run.error, ModelError)
    assert "the adapter funny changed since the run was planned" in run.error.message
    run.journal.write_text("{}\n", encoding="utf-8")  # as after a first result
    with pytest.raises(RunConflictError, match=r"--lora funny=.* \(sha256:"):
        run.open()
    assert run.open(force_resume=True).plan.adapters


def test_order_and_place_of_adapters_do_not_matter_on_resume(run: Adapted) -> None:
    run.asks("formal")
    before = run.plan()
    run.options["lora"] = dict(reversed(run.options["lora"].items()))
    moved = run.folder / "elsewhere"
    moved.mkdir()
    path = Path(run.options["lora"]["formal"])
    run.options["lora"]["formal"] = str(path.rename(moved / path.name))
    assert run.plan().id == before.id
    run.options["lora"] = {}
    assert run.asks(None).plan().id != before.id


def test_a_job_mounts_the_adapters(run: Adapted) -> None:
    plan = run.asks("formal").plan()
    script = JobScript.of_run(plan.input_path, plan.output, plan.options, plan.models_dir,
                              SlurmConfig(), run.folder / "i.sif", run.folder)  # fmt: skip
    assert {*map(str, script.with_models(plan).model_paths)} >= {*run.options["lora"].values()}


def test_a_run_shows_its_adapters(
    run: Adapted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.folder)
    run.asks("funny", None)
    assert run.run() is ExitCode.OK, run.error
    assert main(["status", "out.json"]) == 0
    assert "--lora funny=" in capsys.readouterr().out
    assert main(["report", "out.json"]) == 0
    shown = (run.folder / "out.json.aiflux" / "report.html").read_text(encoding="utf-8")
    assert "funny (LoRA adapter of" in shown
    assert run.plan().adapter_digests["funny"] in shown


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, 'peft_type in .* is "IA3"'),
    "dora": ({"use_dora": True}, "use_dora in .* is true"),
    "bias": ({"bias": "all"}, 'bias in .* is "all"'),
    "more modules": ({"modules_to_save": ["lm_head"]}, r'modules_to_save in .* is \["lm_head"\]'),
    "modules of another form": ({"modules_to_save": [[1]]}, r"modules_to_save in .* is \[\[1\]\]"),
    "a number of modules": ({"modules_to_save": 5}, "modules_to_save in .* is 5"),
    "no rank": ({"r": None}, 'the adapter bad is damaged: .* has no rank: {"r": null}'),
    "a rank as text": ({"r": "8"}, 'has no rank: {"r": "8"}'),
    "no rank for a part": ({"rank_pattern": [1]}, r'{"r": 4, "rank_pattern": \[1\]}'),
    "another rank": ({"r": 2}, "gives the rank 2, but .* has matrices of rank 4"),
    "too large": ({"r": 1024}, "cannot load the adapter bad .*: it has rank 1024, .* is 512"),
    "wide": ({"width": 128}, "adapter bad .* is for another model: it has .* of 128, .* is 64"),
    "deep": ({"layers": 3}, "matrices for layer 2, and the model has 2 layers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_vllm_cannot_load_is_refused_before_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, message = BROKEN[name]
    run = vllm(tmp_path, monkeypatch)
    rank = changes.pop("rank", 4)
    run.options["lora"] = {"bad": str(put_peft(tmp_path / "bad", LLAMA, rank, **changes))}
    with pytest.raises(ModelError, match=message) as caught:
        run.asks("bad").open()
    assert caught.value.remedy


def test_files_that_are_missing_or_damaged_are_refused(
    run: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        run.options["lora"] = {"bad": str(path)}
        with pytest.raises(AifluxError) as caught:
            run.asks("bad").open()
        assert caught.value.remedy
        return caught.value.message

    (run.folder / "empty").mkdir()
    assert refused(run.folder / "none").endswith("none does not exist")
    if run.engine == "llamacpp":
        assert refused(run.folder / "empty").endswith("empty is a directory")
        (run.folder / "model.gguf").write_bytes(make_tiny_gguf.tiny())
        assert "has no general.type" in refused(run.folder / "model.gguf")
        (run.folder / "q.gguf").write_bytes(gguf_adapter("qwen2"))
        assert "is for the architecture qwen2" in refused(run.folder / "q.gguf")
        (run.folder / "a,b.gguf").write_bytes(gguf_adapter())
        assert "a,b.gguf" in refused(run.folder / "a,b.gguf")
        for size, words in ((0, "it is empty"), (100, "ends too early"), (-10, "is truncated")):
            (run.folder / "cut.gguf").write_bytes(gguf_adapter()[:size])
            assert words in (seen := refused(run.folder / "cut.gguf"))
            assert seen.startswith("the adapter bad is damaged: ")
        return
    (run.folder / "file").touch()
    assert refused(run.folder / "file").endswith("file is a file")
    assert refused(run.folder / "empty").endswith("empty has no adapter_config.json")
    assert "has no adapter_config.json" in refused(put_folder(run.folder / "model"))
    for file, size, words in (
        ("adapter_config.json", 0, "is not JSON: it ends too early"),
        ("adapter_config.json", 40, "is not JSON: it ends too early"),
        ("adapter_config.json", -1, "is not JSON: it ends too early"),
        ("adapter_model.safetensors", 0, "is incomplete: it has 0 bytes"),
        ("adapter_model.safetensors", 50, "is incomplete: it ends in its header"),
        ("adapter_model.safetensors", -1, "is incomplete: it has 8262 bytes of 8263"),
    ):
        cut = put("vllm", run.folder, "cut")
        content = (cut / file).read_bytes()
        (cut / file).write_bytes(content[:size])
        assert refused(cut) == f"the adapter bad is damaged: {cut / file} {words}"
    (cut / "adapter_model.safetensors").unlink()
    assert refused(cut).endswith("cut has no adapter_model.safetensors")


SETTINGS = ["peft_type", "use_dora", "lora_bias", "bias", "modules_to_save", "r", "rank_pattern",
            "base_model_name_or_path"]  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda each: (
        st.lists(each, max_size=2) | st.dictionaries(st.text(max_size=3), each, max_size=2)
    ),
    max_leaves=4,
)


@given(config=st.dictionaries(st.sampled_from(SETTINGS), json_values))
def test_no_configuration_of_an_adapter_is_a_bug(
    config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = put_peft(tmp_path_factory.getbasetemp() / "any", LLAMA, **config)
    with suppress(ModelError):
        assert read_adapter("any", path, None).rank >= 4


def test_an_adapter_of_another_base_model_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = vllm(tmp_path, monkeypatch)
    for base, warns in (("org/tiny", 0), ("mirror/Tiny", 0), ("/data/tiny/", 0), ("org/big", 1)):
        path = put_peft(tmp_path / "one", LLAMA, base_model_name_or_path=base)
        run.options["lora"] = {"one": str(path)}
        findings = [*check_fields(run.asks("one").plan())]
        assert [finding.level for finding in findings] == ["warning"] * warns, base
    assert "the adapter one was made for org/big" in findings[0].what


def test_llamacpp_applies_adapters_to_text_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Adapted(tmp_path, "llamacpp", monkeypatch)
    line = request_line("e", url="/v1/embeddings", body={"input": "x", "model": "funny"})
    run.input.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="to text only"):
        run.open()


def test_a_body_may_have_scales_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Adapted(tmp_path, "llamacpp", monkeypatch)
    body = {"messages": [{"role": "user", "content": "x"}], "lora": [{"id": 1, "scale": 0.5}]}
    run.input.write_text(request_line("r", body=body) + "\n", encoding="utf-8")
    assert run.run() is ExitCode.OK, run.error
    assert run.results[0]["output"]["choices"][0]["message"]["content"] == "funny: x"


def test_paths_are_those_of_the_command_line_or_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aiflux.yaml").write_text("run: {lora: {a: ad/a}}\n", encoding="utf-8")
    assert Config(environ={}).run_options().lora == {"a": str(tmp_path / "ad" / "a")}
    environ = {"AIFLUX_LORA": "a=x 'b=with space'"}
    expected = {"a": str(tmp_path / "x"), "b": str(tmp_path / "with space")}
    assert Config(environ=environ).run_options().lora == expected
    given = {"lora": ("a=~/x", "b=/y")}
    monkeypatch.setenv("HOME", "/home/u")
    assert Config(arguments=given, environ={}).run_options().lora == {"a": "/home/u/x", "b": "/y"}
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(ConfigError, match="lora"):
            Config(arguments={"lora": (wrong,)}, environ={})


@pytest.mark.parametrize("engine", ["ollama", "external", "command"])
def test_other_engines_refuse_adapters(tmp_path: Path, engine: str) -> None:
    run = Working(tmp_path, None, models_dir=tmp_path, model="m:1", lora={"a": "/a"})
    if engine == "external":
        run.options["engine_url"] = "http://127.0.0.1:1"
    elif engine == "command":
        run.options["engine_command"] = f"{sys.executable} {{port}}"
    with pytest.raises(ConfigError, match="--lora") as caught:
        run.prompts("x").open()
    assert caught.value.remedy


def test_check_knows_the_adapters(
    run: Adapted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.asks("funny", "polite")
    monkeypatch.chdir(run.folder)
    adapters = "\n".join(f"    {name}: {path}" for name, path in run.options["lora"].items())
    (run.folder / "aiflux.yaml").write_text(f"run:\n  lora:\n{adapters}\n", encoding="utf-8")
    assert main(["check", "in.jsonl", "--model", run.site.model]) == ExitCode.USAGE
    printed = capsys.readouterr().err
    assert "line 2" in printed
    assert "line 1" not in printed
