"""What is known about models, as tables and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from aiflux.core.config.config import Config
from aiflux.core.config.engine_kinds import KINDS
from aiflux.engines.base import ListedModel
from aiflux.engines.kinds import kind_named, storing_kind
from aiflux.engines.ollama.memory import estimate, has_one_slot
from aiflux.engines.ollama.staging import Staged, staged_models
from aiflux.engines.ollama.store import (
    StoredModel,
    best_figures,
    listed_models,
    missing_parts,
    model_digest,
    read_manifest,
    readable_model,
    refuse_other_digest,
)
from aiflux.engines.vllm.memory import memory_needed
from aiflux.errors import ModelError, UsageError
from aiflux.models.catalog import Catalog, CatalogModel
from aiflux.models.figures import Architecture, Figures
from aiflux.models.name import HUB_PREFIX, ModelName, is_hub_name, parse_model_name
from aiflux.util.text import counted, size_text

_CONTEXTS = (2048, 8192, 32768)
_SLOTS = (1, 4, 8, 16, 32)
_LEAST_IMPORTANT = ("ENGINES", "OLLAMA", "COMMIT", "CONTEXT", "WEIGHTS", "QUANT")
_UNITS = {"m": 2**20, "": 2**30, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class Known:
    """What is known about one model.

    Attributes:
        stored: facts of its own file; None if it is missing or unreadable.
        digest: None if it is not in the models directory.
        missing: missing parts of an incomplete model.
    """

    name: ModelName
    catalog_model: CatalogModel | None
    stored: StoredModel | None
    digest: str | None
    missing: tuple[str, ...]
    size: int

    @property
    def figures(self) -> Figures | None:
        """The figures that determine its memory: of its own file, else of the catalog."""
        return best_figures(self.stored, self.catalog_model)

    @property
    def parameters(self) -> int:
        """Their number; 0 if unknown."""
        listed = self.catalog_model.parameters if self.catalog_model else 0
        return self.stored.parameters if self.stored else listed

    @property
    def quantisation(self) -> str:
        """Such as Q4_K_M; "" if unknown."""
        listed = self.catalog_model.quantisation if self.catalog_model else ""
        return (self.stored.quantisation if self.stored else "") or listed

    @property
    def state(self) -> str:
        """Whether it is in the models directory."""
        return "" if self.digest is None else "damaged" if self.missing else "yes"

    def to_json(self, context: int, slots: int) -> dict[str, Any]:
        """Return what is known, for programs; sizes are bytes, None is unknown."""
        listed = self.catalog_model
        shape = self.figures.architecture if self.figures else None
        return {
            "name": self.name.served,
            "here": self.digest is not None and not self.missing,
            "digest": self.digest,
            "missing": list(self.missing),
            "size": self.size or None,
            "family": listed.family if listed else None,
            "parameters": self.parameters or None,
            "quantisation": self.quantisation or None,
            "licence": listed.licence if listed else None,
            "endpoints": list(listed.endpoints) if listed else None,
            "vision": listed.vision if listed else None,
            "defaults": listed.defaults if listed else {},
            **_catalog_json(listed),
            "context": shape.context if shape else None,
            "architecture": shape.name if shape else None,
            "layers": shape.layers if shape else None,
            "memory": _memory_json(self.figures, context, slots),
        }


@dataclass(frozen=True)
class KnownSnapshot:
    """What is known about one model of Hugging Face.

    Attributes:
        name: ``hf:ORG/NAME``, or with the revision that is stored.
        repo: ``ORG/NAME`` in the catalog.
        catalog_model: None if the catalog does not know it.
        stored: None if it is not in the models directory.
        figures: of its files, else of the catalog.
    """

    name: str
    repo: str
    catalog_model: CatalogModel | None
    stored: ListedModel | None
    figures: Figures | None

    @property
    def ollama_name(self) -> str:
        """The name of the same model in Ollama's library; "" if there is none."""
        listed = self.catalog_model
        return listed.name if listed and not is_hub_name(listed.name) else ""

    @property
    def quantisation(self) -> str:
        """Format of its weights; "" if unknown."""
        return self.catalog_model.hub[self.repo] if self.catalog_model else ""

    @property
    def parameters(self) -> int:
        """Their number; 0 if unknown."""
        return self.catalog_model.parameters if self.catalog_model else 0

    @property
    def order(self) -> tuple[str, int, str]:
        """Position in a list: models of a family together, by size."""
        family = self.catalog_model.family if self.catalog_model else self.repo.rpartition("/")[2]
        return family.lower(), self.parameters, self.name

    def memory(self, context: int, slots: int) -> int:
        """Return bytes of memory on one GPU; 0 if unknown."""
        if self.figures is None:
            return 0
        limit = self.figures.architecture.context or context
        return memory_needed(self.figures, min(context, limit), slots, 1)

    def to_json(self, context: int, slots: int) -> dict[str, Any]:
        """Return what is known, for programs; sizes are bytes, None is unknown."""
        listed, figures = self.catalog_model, self.figures
        shape = figures.architecture if figures else None
        absent = {"name": self.name, "here": False, "digest": None, "missing": [], "size": None}
        return {
            **(stored_json(self.stored) if self.stored else absent),
            "family": listed.family if listed else None,
            "parameters": self.parameters or None,
            "quantisation": self.quantisation or None,
            "licence": listed.licence if listed else None,
            "endpoints": list(listed.endpoints) if listed else None,
            "vision": listed.vision if listed else None,
            **_catalog_json(listed),
            "engines": ["vllm"],
            "ollama": self.ollama_name or None,
            "context": shape.context if shape else None,
            "architecture": shape.name if shape and shape.heads else None,
            "layers": shape.layers if shape and shape.heads else None,
            "memory": figures and {
                "context_length": context,
                "slots": slots,
                "least": self.memory(context, slots),
                "weights": figures.weights,
                "measured": figures.measured,
            },
        }  # fmt: skip


def _catalog_json(listed: CatalogModel | None) -> dict[str, Any]:
    return {
        "hub": [HUB_PREFIX + repo for repo in listed.hub] if listed else [],
        "engines": list(listed.engines) if listed else None,
        "sources": list(listed.sources) if listed else [],
    }


def find_models(
    config: Config, context: int, slots: int, *, here: bool, room: int | None
) -> list[Known]:
    """Return the models of the models directory and of the catalog.

    Args:
        here: only those of the models directory.
        room: only those that need at most this much GPU memory.
    """
    folder, catalog = config.models_dir, config.catalog()
    names = {name.served: name for name in listed_models(folder)}
    if not here:
        listed = (name for name in catalog.models if not is_hub_name(name))
        names |= {name: parse_model_name(name) for name in listed if name not in names}
    models = [known(folder, catalog, name) for name in names.values()]
    return [model for model in models if room is None or _memory(model, context, slots, room)]


def models_table(
    models: Sequence[Known], folder: Path, context: int, slots: int, width: int | None = None
) -> Iterator[str]:
    """Yield models as a table, and unfinished pulls and imports.

    Args:
        width: columns of the terminal, for which the least important figures are left out; None
            for all of them.
    """
    rows = [_row(model, context, slots) for model in sorted(models, key=_order)]
    heads = ("NAME", "PARAMS", "QUANT", "SIZE", "CONTEXT", "GPU MEMORY", "ENGINES", "HERE")
    yield from _table([heads, *rows], width)
    yield from map(_unfinished, staged_models(folder))


def _unfinished(staged: Staged) -> str:
    what = "pull" if staged.what == "pull" else "import"
    states = {
        True: "in progress",
        False: "interrupted",
        None: "in progress elsewhere, or interrupted",
    }
    line = f"{what} {states[staged.active]}: {staged.name or staged.folder}"
    line += f" ({size_text(staged.size)})"
    if staged.active:
        return line
    if staged.what == "pull":
        command = f"aiflux models pull {staged.name}".rstrip()
        return f"{line}; continue it: {command}"
    return f"{line}; import it again, or: aiflux models remove {staged.name}"


def find_model(config: Config, text: str) -> Known:
    """Return what is known about one model.

    Raises:
        ModelError: nothing is known, or the stored model has another digest than requested.
    """
    name, catalog = parse_model_name(text), config.catalog()
    model = known(config.models_dir, catalog, name)
    if model.figures is None and model.digest is None:
        hub = HUB_PREFIX + f"{name.namespace}/{name.model}"
        near = catalog.nearest(name.served) or (hub if catalog.find(hub) else None)
        meant = "" if near is None else f"did you mean {near}? "
        raise ModelError(
            f"{name.served} is unknown: it is neither in {config.models_dir} nor in a catalog",
            f"{meant}it may still work; pull it to read its figures: aiflux models pull "
            f"{name.served}",
        )
    if model.digest is not None:
        refuse_other_digest(name, model.digest, str(config.models_dir))
    return model


def model_lines(model: Known, folder: Path) -> Iterator[str]:
    """Yield what is known about one model."""
    yield model.name.served
    yield from (f"  {key:<14}{value}" for key, value in _facts(model, folder))
    if model.figures is not None:
        yield ""
        yield from _memory_table(model.figures)


def known(folder: Path, catalog: Catalog, name: ModelName) -> Known:
    """Return what is known about a model."""
    catalog_model = catalog.find(name.served)
    digest = model_digest(folder, name)
    missing = tuple(missing_parts(folder, name)) if digest else ()
    if digest is not None:
        size = read_manifest(folder, name).size
    else:
        size = catalog_model.size + catalog_model.projector_size if catalog_model else 0
    return Known(name, catalog_model, readable_model(folder, name), digest, missing, size)


def find_snapshots(
    config: Config, context: int, slots: int, *, here: bool, room: int | None
) -> list[KnownSnapshot]:
    """Return the models of Hugging Face in the models directory and in the catalog.

    Args:
        here: only those of the models directory.
        room: only those that need at most this much GPU memory.
    """
    folder, catalog = config.models_dir, config.catalog()
    stores = (kind_named(name).store for name in KINDS)
    stored = [model for store in stores if store is not None for model in store.listed(folder)]
    found = [_known_snapshot(folder, catalog, each.name, each) for each in stored]
    if not here:
        names = {each.repo for each in found}
        found += [
            _known_snapshot(folder, catalog, HUB_PREFIX + repo, None)
            for repo in catalog.hub
            if repo not in names
        ]
    return [each for each in found if room is None or 0 < each.memory(context, slots) <= room]


def stored_json(model: ListedModel) -> dict[str, Any]:
    """Return a stored model for programs; sizes are bytes."""
    return {
        "name": model.name,
        "here": not model.problem,
        "digest": model.digest,
        "missing": [model.problem] if model.problem else [],
        "size": model.size,
    }


def find_snapshot(config: Config, name: str) -> KnownSnapshot:
    """Return what is known about one model of Hugging Face.

    Raises:
        ModelError: it is neither stored nor in the catalog.
    """
    folder, catalog = config.models_dir, config.catalog()
    store = storing_kind(name).store
    try:
        stored = None if store is None else store.find(folder, name)
    except ModelError:
        if catalog.hub_repo(name) is None:
            raise
        stored = None
    return _known_snapshot(folder, catalog, stored.name if stored else name, stored)


def _known_snapshot(
    folder: Path, catalog: Catalog, name: str, stored: ListedModel | None
) -> KnownSnapshot:
    repo = catalog.hub_repo(name)
    figures = storing_kind(name).figures(folder if stored else None, name, catalog)
    if repo is None:
        return KnownSnapshot(name, name.partition("@")[0][len(HUB_PREFIX) :], None, stored, figures)
    shown = name if stored else HUB_PREFIX + repo
    return KnownSnapshot(shown, repo, catalog.hub[repo], stored, figures)


def snapshots_table(
    models: Sequence[KnownSnapshot],
    folder: Path,
    context: int,
    slots: int,
    width: int | None = None,
) -> Iterator[str]:
    """Yield models of Hugging Face as such a table, and what the tables' figures mean."""
    if models:
        rows = [
            _snapshot_row(each, context, slots) for each in sorted(models, key=attrgetter("order"))
        ]
        heads = ("HUGGING FACE", "PARAMS", "WEIGHTS", "CONTEXT", "GPU MEMORY", "ENGINES", "OLLAMA",
                 "COMMIT", "HERE")  # fmt: skip
        yield ""
        yield from _table([heads, *rows], width)
    size = f"{counted(slots, 'slot')} of {context} tokens"
    yield f"\nGPU memory: at least, with {size}\nhere: {folder}"


def _snapshot_row(model: KnownSnapshot, context: int, slots: int) -> tuple[str, ...]:
    memory, stored = model.memory(context, slots), model.stored
    return (
        model.name,
        _count(model.parameters) if model.parameters else "",
        model.quantisation,
        str(model.figures.architecture.context or "") if model.figures else "",
        size_text(memory) if memory else "",
        "vllm",
        model.ollama_name,
        stored.digest[:12] if stored else "",
        "" if stored is None else "damaged" if stored.problem else "yes",
    )


def snapshot_lines(model: KnownSnapshot, folder: Path, context: int, slots: int) -> Iterator[str]:
    """Yield what is known about a model of Hugging Face."""
    yield model.name
    facts = _snapshot_facts(model, folder, context, slots)
    yield from (f"  {key:<14}{value}" for key, value in facts)


def _snapshot_facts(
    model: KnownSnapshot, folder: Path, context: int, slots: int
) -> Iterator[tuple[str, str]]:
    listed, stored, figures = model.catalog_model, model.stored, model.figures
    if listed is not None:
        yield "family", listed.family
        yield "parameters", _count(model.parameters) if model.parameters else "unknown"
        yield "weights", model.quantisation
    if stored is not None:
        yield "commit", stored.digest
        yield "size", size_text(stored.size)
    if figures is not None:
        yield "context", f"{figures.architecture.context} tokens"
        if figures.architecture.heads:
            yield "architecture", _shape_text(figures.architecture)
        memory = size_text(model.memory(context, slots))
        yield (
            "GPU memory",
            (
                f"{size_text(figures.weights)} of weights; at least {memory} in vLLM, with "
                f"{counted(slots, 'slot')} of {context} tokens"
            ),
        )
    if listed is not None:
        yield from _listed_facts(listed)
    yield "engines", "vllm"
    if model.ollama_name:
        yield "Ollama", model.ollama_name
    absent = f"no (aiflux models pull {model.name})"
    yield "here", (stored.problem or str(folder)) if stored else absent


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``40GB``.

    A GB is 2^30 bytes, as in the names of GPUs, so ``40GiB`` is the same; the default unit is GB.

    Raises:
        UsageError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([mgt]?)(?:i?b)?", text.strip().lower())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise UsageError(f"--fits {text!r} is not a size", "such as --fits 40GB")
    return size


def _memory_json(figures: Figures | None, context: int, slots: int) -> dict[str, Any] | None:
    if figures is None:
        return None
    least = estimate(figures, context, slots, flash=True)
    return {
        "context_length": context,
        "slots": slots,
        "least": least.total,
        "ollama_0.9.3": estimate(figures, context, slots).total,
        "weights": least.weights,
        "cache": least.cache,
        "measured": figures.measured,
    }


def _memory(model: Known, context: int, slots: int, room: int | None = None) -> int:
    """Return the least memory; 0 where it is not known, or is more than ``room``."""
    if model.figures is None:
        return 0
    total = estimate(model.figures, context, slots, flash=True).total
    return 0 if room is not None and total > room else total


def _order(model: Known) -> tuple[str, int]:
    family = model.catalog_model.family if model.catalog_model else model.name.model
    return family.lower(), model.size


def _row(model: Known, context: int, slots: int) -> tuple[str, ...]:
    memory = _memory(model, context, slots)
    return (
        model.name.served,
        _count(model.parameters) if model.parameters else "",
        model.quantisation,
        size_text(model.size) if model.size else "",
        str(model.figures.architecture.context or "") if model.figures else "",
        size_text(memory) if memory else "",
        " ".join(model.catalog_model.engines if model.catalog_model else ()),
        model.state,
    )


def _count(parameters: int) -> str:
    if parameters >= 999_500_000:  # which is 1.0 B
        return f"{parameters / 1e9:.1f} B"
    return f"{parameters / 1e6:.{0 if parameters >= 10_000_000 else 1}f} M"


def _table(rows: list[tuple[str, ...]], most: int | None = None) -> Iterator[str]:
    """Yield rows as lines; `models show` has what a narrow terminal has no room for."""
    columns = [*zip(*rows, strict=True)]
    for head in _LEAST_IMPORTANT:
        width = sum(max(map(len, column)) + 2 for column in columns) - 2
        if most is not None and width > most:
            columns = [column for column in columns if column[0] != head]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def _facts(model: Known, folder: Path) -> Iterator[tuple[str, str]]:
    listed, figures = model.catalog_model, model.figures
    if listed is not None:
        if listed.name != model.name.served.lower():
            yield "alias of", listed.name
        yield "family", listed.family
    yield "parameters", _count(model.parameters) if model.parameters else "unknown"
    yield "quantisation", model.quantisation or "unknown"
    yield "size", size_text(model.size)
    if figures is not None:
        shape = figures.architecture
        yield "context", f"{shape.context} tokens"
        yield "architecture", _shape_text(shape)
        if has_one_slot(shape):
            yield "slots", "1 (Ollama always runs this model with one slot)"
    if listed is not None:
        yield from _listed_facts(listed)
        if listed.defaults:
            yield "defaults", ", ".join(f"{key} {value}" for key, value in listed.defaults.items())
        yield "engines", ", ".join(listed.engines)
        if listed.hub:
            yield "Hugging Face", ", ".join(HUB_PREFIX + repo for repo in listed.hub)
    yield "here", _here(model, folder)


def _listed_facts(listed: CatalogModel) -> Iterator[tuple[str, str]]:
    """Yield what the catalog knows whatever the engine."""
    images = " (also images)" if listed.vision else ""
    yield "endpoints", ", ".join(listed.endpoints) + images
    yield "licence", listed.licence
    yield "catalog", str(listed.place)
    for source in listed.sources:
        yield "source", source


def _shape_text(shape: Architecture) -> str:
    experts = f", {shape.experts} experts ({shape.experts_used} used)" if shape.experts else ""
    sliding = f", sliding window {shape.sliding_window}" if shape.sliding_window else ""
    return (
        f"{shape.name}: {shape.layers} layers, {shape.heads} heads ({shape.kv_heads} of keys "
        f"and values) of {shape.key_size}, {shape.vocabulary} tokens{experts}{sliding}"
    )


def _here(model: Known, folder: Path) -> str:
    if model.digest is None:
        return f"no (aiflux models pull {model.name.served})"
    if model.missing:
        return f"incomplete, missing: {', '.join(model.missing)}"
    return f"{folder}, sha256:{model.digest}"


def _memory_table(figures: Figures) -> Iterator[str]:
    context = figures.architecture.context or _CONTEXTS[-1]
    lengths = [length for length in _CONTEXTS if length <= context] or [context]
    slots = (1,) if has_one_slot(figures.architecture) else _SLOTS
    heads = ("  slots", *(f"{length} tokens" for length in lengths))
    rows = [
        (
            f"  {count:>5}",
            *(size_text(estimate(figures, each, count, flash=True).total) for each in lengths),
        )
        for count in slots
    ]
    source = "from its own file" if figures.measured else "from the catalog"
    yield f"  GPU memory on one GPU, at least ({source}):"
    yield from _table([heads, *rows])
