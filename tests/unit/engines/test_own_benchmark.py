"""The command lines of the engines' own benchmark tools, and the figures in what they print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aiflux.engines.kinds import kind_named
from aiflux.engines.own_benchmark import BenchmarkLoad, OwnBenchmark
from aiflux.errors import ModelError
from tests.tools import make_tiny_gguf
from tests.unit.helpers import write_program
from tests.unit.made_models import put_model
from tests.unit.made_snapshots import put_folder


def own(kind: str) -> OwnBenchmark:
    found = kind_named(kind).own_benchmark
    assert found is not None
    return found


def load(model: str, models_dir: Path, url: str | None = None) -> BenchmarkLoad:
    return BenchmarkLoad(model, models_dir, url, 64, 8, 100, 50)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_llama_cpps_tool_decodes_the_sequences_of_the_point(tmp_path: Path) -> None:
    put_model(tmp_path, "m:1", make_tiny_gguf.tiny())
    words = own("llamacpp").words(load("m:1", tmp_path))
    assert Path(option(words, "-m")).read_bytes()[:4] == b"GGUF"
    figures = {name: option(words, name) for name in ("-npp", "-ntg", "-npl", "-c")}
    assert figures == {"-npp": "100", "-ntg": "50", "-npl": "8,1", "-c": "1200"}
    assert "-t" not in words
    limited = replace(load("m:1", tmp_path), threads=3)
    assert option(own("llamacpp").words(limited), "-t") == "3"


def test_llama_cpps_tool_is_found_next_to_the_server(tmp_path: Path) -> None:
    server = write_program(tmp_path / "llama-server", "#!/bin/sh\n")
    nothing = {"PATH": str(tmp_path / "bin")}
    assert own("llamacpp").find(str(server), nothing) is None
    assert own("llamacpp").find(None, nothing) is None
    near = write_program(tmp_path / "llama-batched-bench", "#!/bin/sh\n")
    assert own("llamacpp").find(str(server), nothing) == str(near)
    assert own("llamacpp").find(None, {"PATH": str(tmp_path)}) == str(near)


def test_vllms_tool_loads_the_snapshot(tmp_path: Path) -> None:
    folder = put_folder(tmp_path / "model")
    words = own("vllm").words(load(str(folder), tmp_path))
    assert words[:2] == ["bench", "throughput"]
    assert option(words, "--model") == str(folder)
    assert option(words, "--max-num-seqs") == "8"
    assert option(words, "--num-prompts") == "64"
    assert option(words, "--random-input-len") == "100"
    assert option(words, "--random-output-len") == "50"
    assert int(option(words, "--max-model-len")) >= 150
    assert "--enforce-eager" not in words
    on_cpu = replace(load(str(folder), tmp_path), on_gpus=False)
    assert "--enforce-eager" in own("vllm").words(on_cpu)
    with pytest.raises(ModelError):
        own("vllm").words(load("hf:org/absent", tmp_path))


def test_a_running_server_is_asked_by_vllms_tool(tmp_path: Path) -> None:
    words = own("external").words(load("m", tmp_path, "http://gpu:8000"))
    assert words[:2] == ["bench", "serve"]
    assert option(words, "--base-url") == "http://gpu:8000"
    assert option(words, "--max-concurrency") == "8"
    assert option(words, "--endpoint") == "/v1/completions"


@pytest.mark.parametrize(
    ("kind", "printed", "expected"),
    [
        ("llamacpp", 'load\n{"pp": 9, "tg": 50, "pl": 8, "t": 2.0}\n', 200.0),
        ("llamacpp", '{"pl": 8}\n[1]\n{"pl": 8, "tg": 1, "t": 0}\n', None),
        ("vllm", "Throughput: 2.10 requests/s, 310.00 total tokens/s, 105.25 output tokens/s\n",
         105.25),
        ("vllm", "Throughput: none\n", None),
        ("vllm", "Processed prompts: 100%|###| 6/6 [00:29<00:00, est. speed input: 8.17 toks/s, "
                 "output: 1.63 toks/s]\r\nThroughput: 0.26 requests/s, 12.28 total tokens/s, "
                 "2.05 output tokens/s\nTotal num prompt tokens:  240\n", 2.05),
        ("external", "Request throughput (req/s):              0.13      \n"
                     "Output token throughput (tok/s):         1.07      \n"
                     "Peak output token throughput (tok/s):    6.00      \n", 1.07),
        ("llamacpp", '{"n_kv_max": 512, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, '
                     '"is_pp_shared": 0, "n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, '
                     '"pp": 40, "tg": 8, "pl": 2, "n_kv": 96, "t_pp": 0.75, "speed_pp": 106.79, '
                     '"t_tg": 0.25, "speed_tg": 65.81, "t": 1.0, "speed": 96.75}\n', 16.0),
        ("external", "Output token throughput (tok/s):         321.50    \n", 321.5),
        ("external", "Total token throughput (tok/s):          900.00    \n", None),
    ],
)  # fmt: skip
def test_the_figure_is_read(kind: str, printed: str, expected: float | None) -> None:
    assert own(kind).tokens_per_second(printed) == expected
