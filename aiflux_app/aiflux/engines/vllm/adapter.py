"""LoRA adapters in the format of PEFT: what vLLM needs to know of them, and their options.

Source: vllm/lora/peft_helper.py and vllm/config/lora.py of 0.32.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from aiflux.core.runs.plan import Adapter
from aiflux.engines.vllm.safetensors import read_header, read_json
from aiflux.errors import ModelError
from aiflux.models.figures import Architecture
from aiflux.util.files import file_digest

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``--max-lora-rank``."""
_AT_ONCE = 8
"""Adapters in one batch, for which vLLM reserves memory."""
# The projections of the text's attention, whose input has the model's width.
_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.[qkv]_proj\.lora_A\.")
_OTHER_PARTS = re.compile(r"vision|visual|audio|speech")
_COPY = "copy or train the adapter again"


def read_adapter(name: str, path: Path, shape: Architecture | None) -> Adapter:
    """Read an adapter's configuration and the header of its weights.

    Args:
        shape: of the model; None if unknown.

    Raises:
        ModelError: a file is missing or damaged, vLLM cannot load it, or it is for another model.
    """
    if not path.is_dir():
        raise ModelError(
            f"the adapter {name} is not a directory: {path}",
            "name the directory with adapter_config.json: --lora NAME=PATH",
        )
    config = read_json(path / _CONFIG, _COPY)
    matrices = _matrices(path / _WEIGHTS)
    problem = _unsupported(config)
    if problem is not None:
        raise ModelError(f"vLLM cannot load the adapter {path}: {problem}", "merge it into a model")
    rank = _rank(path, config, matrices)
    if shape is not None:
        _refuse_other_shape(path, matrices, shape)
    digest = sha256()
    for file in (_CONFIG, _WEIGHTS):
        digest.update(bytes.fromhex(file_digest(path / file)))
    base = config.get("base_model_name_or_path")
    return Adapter(name, str(path), digest.hexdigest(), rank, base if isinstance(base, str) else "")


def _unsupported(config: dict[str, Any]) -> str | None:
    """Return the setting that vLLM does not support; None without one."""
    kept = config.get("modules_to_save") or []
    checks = {
        f"peft_type is {config.get('peft_type')!r}, not LORA": config.get("peft_type") != "LORA",
        "use_dora is true": config.get("use_dora"),
        "lora_bias is true": config.get("lora_bias"),
        f"bias is {config.get('bias')!r}": config.get("bias", "none") != "none",
        f"modules_to_save is {kept!r}": not {*kept} <= {"classifier", "score"},
    }
    return next((text for text, wrong in checks.items() if wrong), None)


def _matrices(path: Path) -> dict[str, tuple[int, int]]:
    """Return rank and input width of each first matrix by its name.

    Raises:
        ModelError: the file is missing or damaged, or has none.
    """
    try:
        found = {
            name: (int(each["shape"][0]), int(each["shape"][-1]))
            for name, each in read_header(path).items()
            if ".lora_A." in name
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"the header of {path} is damaged: {error!r}", _COPY) from error
    if not found:
        raise ModelError(f"{path} has no LoRA matrices", _COPY)
    return found


def _rank(path: Path, config: dict[str, Any], matrices: Mapping[str, tuple[int, int]]) -> int:
    """Return the rank of the largest matrices.

    Raises:
        ModelError: the configuration has none or another, or vLLM does not support it.
    """
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise ModelError(f"{path / _CONFIG} has no rank: r is {config.get('r')!r}", _COPY)
    rank: int = max(ranks)
    largest = max(each for each, _ in matrices.values())
    if largest > rank:
        raise ModelError(
            f"{path / _CONFIG} gives the rank {rank}, but {_WEIGHTS} has matrices of rank "
            f"{largest}",
            _COPY,
        )
    if rank > _RANKS[-1]:
        raise ModelError(
            f"the adapter {path} has rank {rank}; vLLM loads up to {_RANKS[-1]}",
            "merge it into a model",
        )
    return rank


def _refuse_other_shape(
    path: Path, matrices: Mapping[str, tuple[int, int]], shape: Architecture
) -> None:
    for name, (_, width) in matrices.items():
        found = _ATTENTION.search(name)
        if found is None or _OTHER_PARTS.search(name):
            continue
        layer = int(found[1])
        what = (
            f"has matrices for a width of {width}, and the model's is {shape.embedding}"
            if width != shape.embedding
            else f"has matrices for layer {layer}, and the model has {shape.layers} layers"
        )
        if width != shape.embedding or layer >= shape.layers:
            raise ModelError(
                f"the adapter {path} is for another model: it {what}",
                "use the adapter's base model: --model",
            )


def adapter_words(adapters: Sequence[Adapter], served: str, *, on_gpus: bool) -> list[str]:
    """Return the words of the command line that load adapters.

    Args:
        served: name of the model in requests.
        on_gpus: whether the model runs on GPUs.
    """
    if not adapters:
        return []
    # On a CPU, vLLM 0.32 applies the adapter in the last place to a request without one that is in
    # a batch with others (lora/ops/torch_ops: its index is -1). So the last place stays empty.
    places = min(len(adapters), _AT_ONCE) if on_gpus else len(adapters) + 1
    largest = max(adapter.rank for adapter in adapters)
    modules = [
        # In this form, names and paths may contain any character.
        json.dumps({"name": adapter.name, "path": adapter.path, "base_model_name": served})
        for adapter in adapters
    ]
    return [
        "--enable-lora",
        f"--max-lora-rank={next(rank for rank in _RANKS if rank >= largest)}",
        f"--max-loras={places}",
        f"--max-cpu-loras={max(places, len(adapters))}",
        "--lora-modules",
        *modules,
    ]
