"""Names that another engine uses: what is advised instead, from the catalog."""

from __future__ import annotations

import pytest

from aiflux.engines.kinds import kind_named, storing_kind
from aiflux.errors import ConfigError


@pytest.mark.parametrize(
    ("engine", "name", "what", "advice"),
    [
        ("ollama", "hf:Qwen/Qwen3-8B", "which Ollama does not run", "vllm; or use Ollama's name of "
         "this model: --model qwen3:8b"),
        ("ollama", "HF:qwen/QWEN3-8B@main", "a model of Hugging Face", "--model qwen3:8b"),
        ("ollama", "hf:lab/mine", "hf:lab/mine is a model of Hugging Face", "use --engine vllm"),
        ("llamacpp", "hf:Qwen/Qwen3-8B", "which llama.cpp does not run",
         "--model qwen3:8b; or name a GGUF file of it: --model FILE.gguf"),
        ("llamacpp", "hf:lab/mine.gguf", "a model of Hugging Face", "use --engine vllm; or name"),
        ("ollama", "mine.GGUF", "mine.GGUF is a GGUF file, which Ollama does not run",
         "use --engine llamacpp; or import it: aiflux models import --gguf mine.GGUF --name"),
        ("ollama", "/data/my model.gguf", "a GGUF file", "--gguf '/data/my model.gguf' --name"),
        ("ollama", "../m.gguf", "a GGUF file", "use --engine llamacpp"),
        ("vllm", "mine.gguf", "a GGUF file, which vLLM does not run", "use --engine llamacpp"),
        ("vllm", "/data/m.gguf", "a GGUF file, which vLLM does not run", "use --engine llamacpp"),
        ("ollama", "/data/model", "/data/model is a path, which Ollama does not run",
         "a directory of Hugging Face: --engine vllm"),
        ("llamacpp", "./model", "a path that does not end with .gguf", "--engine vllm"),
        ("llamacpp", "~/model.bin", "does not end with .gguf", "rename or link the GGUF file"),
        ("llamacpp", "..", "does not end with .gguf", "--engine vllm"),
        ("llamacpp", "a b", "'a b' is not a model name", "or name a GGUF file: --model FILE.gguf"),
        ("vllm", "qwen3:8b", "qwen3:8b is a model of Ollama, which vLLM does not run",
         "use the name on Hugging Face: --model hf:Qwen/Qwen3-8B; or use --engine ollama (not in "),
        ("vllm", "QWEN3:latest", "a model of Ollama", "--model hf:Qwen/Qwen3-8B"),
        ("vllm", "lama3.2:3b", "a model of Ollama", "Face: --model "
         "hf:meta-llama/Llama-3.2-3B-Instruct; or use --model llama3.2:3b --engine ollama"),
        ("vllm", "llava:13b", "'llava:13b' is not a model of Hugging Face", "use --engine ollama"),
        ("vllm", "no such:name", "is not a model of Hugging Face", "write hf:ORG/NAME"),
    ],
)  # fmt: skip
def test_the_name_for_the_engine_is_advised(engine: str, name: str, what: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind_named(engine).distinct_models([name])
    assert what in caught.value.message
    assert advice in (caught.value.remedy or "")


def test_the_prefix_may_have_capitals() -> None:
    kind = kind_named("vllm")
    assert kind.distinct_models(["HF:Qwen/Qwen3-8B@main"]) == ["hf:Qwen/Qwen3-8B@main"]
    assert kind.served_name("Hf:Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert kind.same_model("HF:Qwen/Qwen3-8B", "qwen/qwen3-8b")
    assert kind.catalog_name("HF:Qwen/Qwen3-8B@main") == "hf:Qwen/Qwen3-8B"
    assert storing_kind("HF:Qwen/Qwen3-8B") is kind
    assert storing_kind("hfqwen3:8b") is kind_named("ollama")


def test_a_tag_may_end_like_a_file() -> None:
    """Ollama names a file of a repository of Hugging Face so."""
    name = "hf.co/org/repo:model.gguf"
    assert kind_named("ollama").distinct_models([name]) == [name]
