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
    _refuse_other_files(name, path)
    try:
        config = read_json(path / _CONFIG, _COPY)
        matrices = _matrices(path / _WEIGHTS)
        rank = _rank(path, config, matrices)
    except ModelError as error:
        raise ModelError(f"the adapter {name} is damaged: {error.message}", _COPY) from error
    problem = _unsupported(config, rank)
    if problem is not None:
        raise ModelError(
            f"vLLM cannot load the adapter {name} ({path}): {problem}", "merge it into a model"
        )
    if shape is not None:
        _refuse_other_shape(name, path, matrices, shape)
    digest = sha256()
    for file in (_CONFIG, _WEIGHTS):
        digest.update(bytes.fromhex(file_digest(path / file)))
    base = config.get("base_model_name_or_path")
    return Adapter(name, str(path), digest.hexdigest(), rank, base if isinstance(base, str) else "")


def _refuse_other_files(name: str, path: Path) -> None:
    """Refuse a path that is not the directory of an adapter.

    Raises:
        ModelError: it is missing, a file, or without one of the two files.
    """
    both = f"{_CONFIG} and {_WEIGHTS}"
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"the adapter {name} is not a directory: {path} {found}",
            f"name the directory with {both}: --lora NAME=PATH",
        )
    missing = next((file for file in (_CONFIG, _WEIGHTS) if not (path / file).exists()), None)
    if missing is not None:
        raise ModelError(
            f"the adapter {name} is incomplete: {path} has no {missing}",
            f"copy the adapter again, or name the directory with {both}: --lora NAME=PATH",
        )


def _unsupported(config: dict[str, Any], rank: int) -> str | None:
    """Return what vLLM does not support; None without that."""
    kept = config.get("modules_to_save")
    wrong = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": kept and not _only(kept, ("classifier", "score")),
    }
    found = next((name for name, problem in wrong.items() if problem), None)
    if found is None:
        return f"it has rank {rank}, and the largest is {_RANKS[-1]}" if rank > _RANKS[-1] else None
    return f"{found} in {_CONFIG} is {json.dumps(config.get(found))}"


def _only(found: object, names: Sequence[str]) -> bool:
    return isinstance(found, list) and all(name in names for name in found)


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
        raise ModelError(
            f"the header of {path} has a tensor without a shape of whole numbers", _COPY
        ) from error
    if not found:
        raise ModelError(f"{path} has no LoRA matrices", _COPY)
    return found


def _rank(path: Path, config: dict[str, Any], matrices: Mapping[str, tuple[int, int]]) -> int:
    """Return the rank of the largest matrices.

    Raises:
        ModelError: the configuration has none or another.
    """
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        shown = {key: config.get(key) for key in ("r", "rank_pattern") if key in config}
        raise ModelError(f"{path / _CONFIG} has no rank: {json.dumps(shown)}", _COPY)
    rank: int = max(ranks)
    largest = max(each for each, _ in matrices.values())
    if largest > rank:
        raise ModelError(
            f"{path / _CONFIG} gives the rank {rank}, but {_WEIGHTS} has matrices of rank "
            f"{largest}",
            _COPY,
        )
    return rank


def _refuse_other_shape(
    name: str, path: Path, matrices: Mapping[str, tuple[int, int]], shape: Architecture
) -> None:
    for matrix, (_, width) in matrices.items():
        found = _ATTENTION.search(matrix)
        if found is None or _OTHER_PARTS.search(matrix):
            continue
        layer = int(found[1])
        what = (
            f"has matrices for a width of {width}, and the model's is {shape.embedding}"
            if width != shape.embedding
            else f"has matrices for layer {layer}, and the model has {shape.layers} layers"
        )
        if width != shape.embedding or layer >= shape.layers:
            raise ModelError(
                f"the adapter {name} ({path}) is for another model: it {what}",
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
