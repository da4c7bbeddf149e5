"""The engine vLLM: its command line, what is refused at once, and the meaning of its answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.base import Engine
from aiflux.engines.process import free_port
from aiflux.engines.sizing import slots
from aiflux.engines.vllm.kind import KIND
from aiflux.engines.vllm.memory import memory_needed
from aiflux.engines.vllm.safetensors import architecture_of
from aiflux.errors import ConfigError, EngineError, ExitCode, InputError, ModelError
from aiflux.models.catalog import read_catalog
from aiflux.models.figures import Figures
from aiflux.slurm.preflight.local import check_models
from aiflux.slurm.preflight.nodes import (
    Room,
    check_division,
    check_endpoints,
    check_memory,
    check_names,
)
from tests.tools.engine_contract import ProgramSite, engine_of, until
from tests.unit.helpers import logged_command, request_line
from tests.unit.made_snapshots import LLAMA, put_folder, put_snapshot
from tests.unit.working import Working

FAKE = Path(__file__).parents[2] / "tools" / "fake_vllm.py"
CHAT = {"body": {"messages": [{"role": "user", "content": "hello"}]}}
EMBEDDING = {"url": "/v1/embeddings", "body": {"input": "hello"}}
GB = 10**9


class Site(ProgramSite):
    """Makes engines with the given options and requests."""

    kind = KIND
    model = "hf:org/tiny"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        put_snapshot(self.models_dir / "hub", "org/tiny")
        self.wrap([sys.executable, str(FAKE)])

    home: Path | None = None

    def engine(
        self, devices: tuple[str, ...] = (), request: dict[str, Any] = CHAT, **options: Any
    ) -> Engine:
        chosen = {"engine": "vllm", "model": self.model, **options}
        plan = plan_of(self.folder, request, **chosen)
        engine = engine_of(KIND, plan, self.folder, self.environ, devices, home=self.home)
        self.made.append(engine)
        return engine

    @property
    def log(self) -> Path:
        return self.folder / "engine-0.log"

    def command(self) -> list[str]:
        """Return the arguments that the server was started with, by its log."""
        return logged_command(self.log)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def plan_of(folder: Path, *requests: dict[str, Any], copies: int = 1, **options: Any) -> Plan:
    path = folder / "in.jsonl"
    lines = [request_line(f"r{at}-{copy}", **each) for at, each in enumerate(requests or (CHAT,))
             for copy in range(copies)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    chosen = RunOptions(**{"engine": "vllm", "model": "hf:org/tiny", **options})
    summary = scan_input(path, chosen.model, rules=KIND.input_rules)
    return make_plan(summary, folder / "o.json", chosen, folder / "models", KIND)


def test_the_server_gets_the_model_its_slots_and_its_context(site: Site) -> None:
    engine = site.engine(slots=5, context_length=3000)
    engine.start()
    words = site.command()
    assert words[:2] == ["serve", str(next(site.models_dir.glob("hub/*/snapshots/*")))]
    assert "--served-model-name=org/tiny" in words
    for option, value in (("--max-num-seqs", "5"), ("--max-model-len", "3000"),
                          ("--host", "127.0.0.1"), ("--generation-config", "vllm")):  # fmt: skip
        assert words[words.index(option) + 1] == value
    assert "--enforce-eager" in words
    assert "--tensor-parallel-size" not in words
    assert (engine.facts.version, engine.facts.slots, engine.facts.context_length) == (
        "0.99.0", 5, 3000)  # fmt: skip
    assert engine.facts.size_bytes == (32 * 64 + 2 * 64 * 64) * 2
    assert engine.describe() == "engine 0 is up on the CPU: vLLM 0.99.0, 5 slots of 3000 tokens"


def test_a_model_without_a_tokenizer_is_refused_before_the_start(site: Site) -> None:
    snapshot = put_snapshot(site.models_dir / "hub", "org/tiny")
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer is in .*/snapshots/") as caught:
        site.engine()
    assert "--engine-arg tokenizer=DIR" in str(caught.value.remedy)
    assert not site.log.exists()
    site.engine(engine_arg={"tokenizer": "/some/where"})
    (snapshot / "tokenizer.model").write_bytes(b"")
    site.engine()


def test_a_directory_may_have_any_name(site: Site) -> None:
    folder = put_folder(site.folder / "-m {0}, 'x' $(y)")
    engine = site.engine(model=str(folder), slots=1)
    engine.start()
    body = {"model": folder.name, "messages": [{"role": "user", "content": "hi"}]}
    assert engine.client.post("/v1/chat/completions", json.dumps(body).encode()).status == 200


def test_its_sockets_are_in_a_folder_whose_path_is_short(site: Site) -> None:
    site.home = site.folder / ("long" * 10) / "home"
    engine = site.engine(slots=1)
    engine.start()
    assert engine.is_ready()


def test_several_gpus_divide_the_model(site: Site) -> None:
    engine = site.engine(("2", "3"), slots=1)
    engine.start()
    words = site.command()
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in words
    assert engine.facts.gpu_bytes == engine.facts.size_bytes
    with pytest.raises(
        ConfigError, match="8 attention heads and 4 key-value heads: 3 GPUs"
    ) as caught:
        site.engine(("0", "1", "2"), slots=1)
    assert caught.value.remedy == "--gpus-per-engine 1 or 2"


def test_embeddings_need_a_separate_server(site: Site, tmp_path: Path) -> None:
    engine = site.engine(request=EMBEDDING, slots=1)
    engine.start()
    assert site.command()[-4:] == ["--runner", "pooling", "--convert", "embed"]
    body = json.dumps({"model": "org/tiny", "input": "x"}).encode()
    assert engine.client.post("/v1/embeddings", body).status == 200
    with pytest.raises(InputError, match="only one of text, embeddings and scores"):
        plan_of(tmp_path, CHAT, EMBEDDING)


def test_a_model_of_an_unknown_architecture_is_left_to_vllm(site: Site) -> None:
    folder = put_folder(site.folder / "odd", {"model_type": "odd"})
    engine = site.engine(("0", "1", "2"), model=str(folder), slots=1)
    engine.start()
    assert engine.facts.size_bytes == 0


def test_a_server_that_ends_during_its_start_shows_its_last_output(site: Site) -> None:
    site.wrap(["sh", "-c", "echo ValueError: no such architecture; exit 7"])
    with pytest.raises(
        EngineError, match=r"exited with status 7 during its start:\n.*no such arch"
    ):
        site.engine(slots=1).start()


def test_a_server_that_does_not_become_ready_is_stopped(site: Site) -> None:
    site.hold()
    with pytest.raises(EngineError, match="vLLM was not ready within 1 s") as caught:
        site.engine(slots=1, load_timeout=1.0).start()
    assert "--load-timeout" in str(caught.value.remedy)
    until(lambda: not Path(f"/proc/{site.started()[0]}").exists())


def test_another_programs_server_on_the_port_is_not_used(site: Site) -> None:
    """A port may be taken between its choice and its use: vLLM then ends, or never listens."""
    pid = site.folder / "other"
    # A stranger has neither the server's parent nor its environment.
    stranger = '(setsid env -u AIFLUX_SERVER "$@" & echo $! >"$0"); sleep 60'
    site.wrap(["sh", "-c", stranger, str(pid), sys.executable, str(FAKE)])
    try:
        with pytest.raises(EngineError, match="another program took the port of vLLM"):
            site.engine(slots=1).start()
    finally:
        os.killpg(int(pid.read_text()), signal.SIGKILL)


def test_a_port_is_free_on_loopback() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (500, "EngineCore encountered an issue. See stack trace (above) for the root cause.",
         "engine_crashed"),
        (503, "EngineCore encountered an issue.", "engine_crashed"),
        (400, "EngineCore encountered an issue.", None),
        (500, "Internal Server Error", None),
        (404, "The model `m` does not exist.", None),
    ],
)  # fmt: skip
def test_a_lost_engine_process_is_a_crash(status: int, message: str, code: str | None) -> None:
    assert KIND.crash_code(status, message) == code


def test_every_parameter_is_passed_on(tmp_path: Path) -> None:
    assert plan_of(tmp_path, top_k=5).options.top_k == 5


def test_a_directory_that_cannot_be_loaded_is_refused_before_submission(tmp_path: Path) -> None:
    absent = plan_of(tmp_path, model=str(tmp_path / "none"))
    (finding,) = check_models(absent)
    assert "model directory not found" in finding.what
    put_folder(tmp_path / "gguf")
    (tmp_path / "gguf" / "model.safetensors").unlink()
    (finding,) = check_models(plan_of(tmp_path, model=str(tmp_path / "gguf")))
    assert "no .safetensors file" in finding.what


BIG = {**LLAMA, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
       "num_key_value_heads": 8}  # fmt: skip
SEVENTY = Figures(architecture_of(BIG), (141_107_412_992 // 80,) * 80, 0)  # Llama 3.3 70B, BF16


def test_the_gpus_for_a_large_model_are_those_that_divide_it(tmp_path: Path) -> None:
    """Five GPUs have room for it, but only a power of two can divide its heads."""
    plan = plan_of(tmp_path, context_length=4096)
    put = put_folder(
        tmp_path / "models" / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40), BIG
    )
    weights = {f"model.layers.{layer}.w": {"dtype": "BF16", "shape": [1],
               "data_offsets": [layer * SEVENTY.layers[0], (layer + 1) * SEVENTY.layers[0]]}
               for layer in range(80)}  # fmt: skip
    text = json.dumps(weights).encode()
    with (put / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 80 * SEVENTY.layers[0])
    (finding,) = check_memory(plan, read_catalog(), Room("l40s", 48 * GB, 4, 8, "--gpus {}"))
    assert "org/tiny does not fit a GPU 'l40s'" in finding.what
    assert "4 such GPUs for each engine are enough: --gpus-per-engine 4;" in finding.fix
    (finding,) = check_memory(plan, read_catalog(), Room("rtx_3090", 36 * GB, 4, 8, "--gpus {}"))
    assert "8 such GPUs for each engine are enough" in finding.fix
    assert memory_needed(SEVENTY, 4096, 1, 5) < 5 * 36 * GB
    three = plan_of(tmp_path, context_length=4096, gpus_per_engine=3)
    assert not [*check_memory(three, read_catalog(), Room("h200", 141 * GB, 4, 8, "--gpus {}"))]
    (finding,) = check_division(three, read_catalog(), 4)
    assert finding.what.startswith("vLLM cannot divide org/tiny among 3 GPUs")
    assert finding.fix == "--gpus-per-engine 1 or 2"


def test_a_model_that_is_not_pulled_is_sized_by_the_catalog(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model="hf:Qwen/Qwen3-32B", context_length=4096)
    (finding,) = check_memory(plan, read_catalog(), Room("l40s", 48 * GB, 4, 8, "--gpus {}"))
    assert "Qwen/Qwen3-32B does not fit a GPU 'l40s'" in finding.what
    assert "2 such GPUs for each engine are enough: --gpus-per-engine 2;" in finding.fix
    room = Room("h100", 80 * GB, 4, 8, "--gpus {}")
    assert [*check_memory(plan, read_catalog(), room)] == []
    other = plan_of(tmp_path, model="hf:lab/mine", context_length=4096)
    assert [*check_memory(other, read_catalog(), Room("v100", GB, 1, 1, "--gpus {}"))] == []
    near = plan_of(tmp_path, model="hf:Qwen/Qwen3_32B")
    assert [*check_names(near, read_catalog())] == [], "the next error has the advice"
    (finding,) = check_models(near)
    assert "did you mean hf:Qwen/Qwen3-32B?" in finding.fix


def test_a_model_for_embeddings_is_not_asked_for_text(tmp_path: Path) -> None:
    (finding,) = check_endpoints(plan_of(tmp_path, CHAT, model="hf:BAAI/bge-m3"), read_catalog())
    assert finding.what.startswith("hf:BAAI/bge-m3 is for embeddings, and 1 request asks for")
    reranking = {"url": "/v1/rerank", "body": {"query": "a", "documents": ["b"]}}
    for request, model in (
        (EMBEDDING, "hf:BAAI/bge-m3"),
        (reranking, "hf:BAAI/bge-m3"),
        (EMBEDDING, "hf:Qwen/Qwen3-8B"),
        (CHAT, "hf:Qwen/Qwen3-8B"),
        (CHAT, str(put_folder(tmp_path / "bge-m3"))),
    ):
        assert [*check_endpoints(plan_of(tmp_path, request, model=model), read_catalog())] == []


@pytest.mark.parametrize(
    ("devices", "free", "known", "requests", "expected"),
    [
        ((), (), True, 1000, 64),
        ((), (), True, 20, 20),
        (("0",), (), True, 1000, 256),
        (("0",), (80 * GB,), False, 1000, 256),
        (("0",), (80 * GB,), True, 1000, 192),
        (("0",), (80 * GB,), True, 100, 100),
        (("0",), (24 * GB,), True, 1000, 8),
        (("0",), (17 * GB,), True, 1000, 1),
    ],
)
def test_slots_of_vllm(
    tmp_path: Path, devices: tuple[str, ...], free: tuple[int, ...], known: bool,
    requests: int, expected: int,
) -> None:  # fmt: skip
    """For Llama 3.1 8B in BF16 with 4096 tokens of context."""
    shape = {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8}  # fmt: skip
    figures = Figures(architecture_of(shape), (16_060_522_496 // 32,) * 32, 0) if known else None
    plan = plan_of(tmp_path, copies=requests, context_length=4096)
    assert slots(KIND, plan, devices, 2, figures, free) == expected


def test_requests_with_the_same_beginning_are_sent_together(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results keep the order of the input."""
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(site.program))
    monkeypatch.setenv("AIFLUX_ENGINE", "vllm")
    run = Working(tmp_path, None, models_dir=site.models_dir, engine="vllm", model=site.model,
                  slots=1, concurrency=1)  # fmt: skip
    prompts = [f"document {at}: {ask}" for ask in "abcd" for at in range(8)]
    assert run.prompts(*prompts, model=None).run() is ExitCode.OK, run.error
    assert [each["input"]["custom_id"] for each in run.results] == [
        f"{at}:{prompt}" for at, prompt in enumerate(prompts)
    ]
    sent = [json.loads(line)["custom_id"] for line in run.journal.read_text().splitlines()]
    documents = [name.split(":")[1] for name in sent]
    assert sum(one != other for one, other in pairwise(documents)) < 20
