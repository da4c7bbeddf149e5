"""The simulated engine's statistics are correct, and the output of bench/gpu is usable.

No test here measures time.
"""

import io
import json
import random
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from bench.children import engine
from bench.decoding import Cost, Decoder, floor
from bench.engine import MODEL
from bench.gpu import llamacpp, smi, transformers_serve
from bench.gpu.measuring import CLIENTS, Mix, Session, output_tokens
from bench.gpu.models import SHAPES, make_gguf, make_hf, word, words

from aiflux.models.gguf import read_gguf

COST = Cost(base=0.004, each=0.001)


def test_one_sequence_takes_the_time_of_its_steps():
    decoder = floor([5], 4, COST)
    assert decoder.makespan == pytest.approx(5 * 0.005)
    assert decoder.occupancy == pytest.approx(1 / 4)


def test_full_slots_are_fully_occupied():
    decoder = floor([7] * 12, 4, COST)
    assert decoder.steps == 21
    assert decoder.makespan == pytest.approx(21 * 0.008)
    assert decoder.occupancy == pytest.approx(1.0)


def test_a_slot_is_filled_as_soon_as_it_is_free():
    decoder = floor([2, 6, 4], 2, COST)
    assert decoder.steps == 6
    assert decoder.occupancy == pytest.approx(1.0)


def test_a_request_that_arrives_during_a_step_waits_for_the_next():
    decoder = Decoder(2, COST)
    decoder.submit("a", 2, at=10.0)
    assert decoder.begin() == pytest.approx(10.005)
    decoder.submit("b", 1, at=10.001)
    assert decoder.end() == []
    assert decoder.begin() == pytest.approx(10.005 + 0.006)
    assert sorted(decoder.end()) == ["a", "b"]
    assert decoder.begin() is None


def test_time_without_requests_counts_as_unused():
    decoder = Decoder(1, COST)
    for at in (0.0, 0.015):
        decoder.submit(None, 1, at)
        decoder.begin()
        decoder.end()
    assert decoder.makespan == pytest.approx(0.020)
    assert decoder.occupancy == pytest.approx(0.5)


def test_no_order_of_arrival_beats_the_floor():
    lengths = [3, 50, 4, 9, 30, 2]
    late = Decoder(2, COST)
    for number, tokens in enumerate(lengths):
        late.submit(number, tokens, at=0.02 * number)
    while late.begin() is not None:
        late.end()
    assert late.makespan >= floor(lengths, 2, COST).makespan


def post(url: str, tokens: int) -> int:
    body = {"messages": [{}], "max_tokens": tokens}
    answer = requests.post(url + "/v1/chat/completions", json=body, timeout=20)
    return int(answer.json()["usage"]["completion_tokens"])


def test_the_engine_over_http_agrees_with_its_statistics():
    lengths = [3, 8, 5, 2, 9, 4]
    with engine(2, COST) as running, ThreadPoolExecutor(6) as threads:
        answered = list(threads.map(lambda tokens: post(running.url, tokens), lengths))
        stats = running.stats()
    assert answered == lengths
    assert stats["done"] == len(lengths)
    # A token costs between a whole step (alone) and half a step (two sequences).
    assert sum(lengths) * 0.005 * 0.999 <= stats["busy"] <= sum(lengths) * 0.006 * 1.001
    assert stats["makespan"] >= floor(sorted(lengths), 2, COST).busy / 2 * 0.8
    assert 0.0 < stats["occupancy"] <= 1.0


def test_the_instant_engine_counts_requests():
    with engine() as running:
        session = requests.Session()
        for _ in range(3):
            assert session.post(running.url + "/v1/chat/completions", data=b"{}", timeout=20).ok
        assert json.loads(session.get(running.url + "/stats", timeout=20).content)["done"] == 3
        session.close()


def test_a_random_gguf_has_the_requested_shape(tmp_path):
    make_gguf(tmp_path / "m.gguf", SHAPES["tiny"])
    header = read_gguf(tmp_path / "m.gguf")
    assert header.architecture == "llama"
    assert header.number("block_count") == SHAPES["tiny"].layers
    assert header.data_size <= (tmp_path / "m.gguf").stat().st_size < header.data_size + 100_000
    assert len(header.tensors) == len(SHAPES["tiny"].tensors)


def test_a_random_hf_model_never_generates_the_end_token(tmp_path):
    shape = SHAPES["tiny"]
    make_hf(tmp_path, shape)
    content = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    assert max(info["data_offsets"][1] for name, info in head.items() if name[0] != "_") == len(
        content[8 + size :]
    )
    start, end = head["lm_head.weight"]["data_offsets"]
    rows = content[8 + size + start : 8 + size + end]
    row = 2 * shape.width
    assert not any(rows[-2 * row :]), "the rows of the two special tokens are zero"
    assert any(rows[256 * row : 257 * row])
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None


def test_every_word_is_one_token_of_the_tokenizer(tmp_path):
    shape = SHAPES["tiny"]
    make_hf(tmp_path, shape)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == shape.vocabulary
    assert all(f"Ġ{word(number)}" in vocabulary for number in range(words(shape)))


def test_cuda_is_only_built_with_a_cuda_compiler(tmp_path):
    configure, build = llamacpp.build_commands(tmp_path, tmp_path / "b", cuda=True)
    assert "-DGGML_CUDA=ON" in configure
    assert build[-2:] == ["llama-server", "llama-batched-bench"]
    assert "-DGGML_CUDA=ON" not in llamacpp.build_commands(tmp_path, tmp_path / "b", cuda=False)[0]


def test_only_required_files_are_taken_from_the_sdist(tmp_path):
    names = (
        "x/README.md",
        "x",
        "x/.git/modules/vendor/llama.cpp/pack",
        "x/vendor/llama.cpp/CMakeLists.txt",
        "x/vendor/llama.cpp/docs/a.md",
        "x/vendor/llama.cpp/tools/ui/CMakeLists.txt",
        "x/vendor/llama.cpp/tools/ui/src/a.ts",
    )
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        taken = [member.name for member in llamacpp.required_members(archive)]
    assert taken == [names[3], names[5]]


def test_the_engines_own_figures_are_output_tokens_per_total_time():
    line = {"pp": 128, "tg": 64, "pl": 16, "t_pp": 0.5, "t_tg": 1.5, "t": 2.0}
    lines = ["main: n_kv_max = 1024", json.dumps(line), ""]
    assert llamacpp.batched_bench_rates(lines) == {16: 512.0}
    lines = ["loading", json.dumps({"level": 4, "rate": 12.5})]
    assert transformers_serve.offline_rates(lines) == {4: 12.5}


def test_only_readings_of_nvidia_smi_are_parsed():
    assert smi.parse("68, 373.55, 24751\n", 5.0) == smi.Sample(5.0, 68.0, 373.55, 24751.0)
    assert smi.parse("[N/A], 12, 3", 5.0) is None
    assert smi.parse("Unable to determine the device handle", 5.0) is None


def test_answer_lengths_are_half_to_one_and_a_half_of_the_mean():
    lengths = Mix(8, 20).lengths(200, random.Random(1))
    assert min(lengths) == 10
    assert max(lengths) == 30


def test_the_bench_measures_aiflux(tmp_path):
    with engine() as running, smi.Sampler() as sampler:
        session = Session(running.url, MODEL, 100, tmp_path, sampler)
        with pytest.raises(RuntimeError, match="1600 tokens instead of"):
            session.measure(CLIENTS[1], Mix(4, 10), 4, 8)
        assert running.stats()["done"] == 8
    assert output_tokens(Path(tmp_path / "out.jsonl")) == 8 * 200
