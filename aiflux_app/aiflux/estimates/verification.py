"""Ask a sample of a run's answered requests again, and compare the answers."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

from aiflux.core.batch.request import WITHOUT_TEXT, custom_id_of, load_json, request_key
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.journal import RawResult
from aiflux.core.runs.output import iterate_results
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.status_file import StatusDetails, read_status
from aiflux.errors import ModelError, UsageError
from aiflux.estimates.pilot import Drawn
from aiflux.models.name import shown_digest
from aiflux.util.files import atomic_write
from aiflux.util.text import joined

SAMPLE = 200
SEED = 1
SUFFIX = ".verify"
_SHOWN = 5
_AROUND = 30
# What differs in every answer, or is measured: not the answer itself.
_VOLATILE = frozenset({
    "id", "call_id", "item_id", "created", "created_at", "completed_at", "index", "logprobs",
    "usage", "timings", "system_fingerprint", "prompt_logprobs", "prompt_token_ids", "token_ids",
})  # fmt: skip
_PAYLOADS = ("choices", "data", "output", "results")


def draw_answered(plan: Plan, run: RunDirectory, count: int, seed: int, target: Path) -> Drawn:
    """Write a sample of the requests that were answered; the same seed draws the same sample.

    Raises:
        UsageError: no request was answered.
        StoppedError: the input is no longer the planned one, or a result is missing.
    """
    results = enumerate(iterate_results(plan, run))
    answered = array("Q", (at for at, (_, result) in results if not result.failed))
    if not answered:
        raise UsageError(
            f"the run {plan.output} has no answers to verify", "verify a run that has some"
        )
    wanted = iter(sorted(Random(seed).sample(answered, min(count, len(answered)))))
    following, drawn, size = next(wanted, None), 0, 0
    with atomic_write(target, 0o600) as file:
        for at, (raw, _) in enumerate(iterate_results(plan, run)):
            if at == following:
                file.write(raw + b"\n")
                drawn, size = drawn + 1, size + len(raw)
                following = next(wanted, None)
    return Drawn(drawn, size)


def answer_of(body: bytes) -> Any:
    """Return the answer in a response, without what differs between equal answers."""
    content = json.loads(body)
    if not isinstance(content, dict):
        return content
    found = next((content[name] for name in _PAYLOADS if name in content), content)
    return _settled(found)


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _settled(each) for name, each in value.items() if name not in _VOLATILE}
    return [_settled(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Difference:
    """The first place at which two answers differ.

    Attributes:
        place: in the answer, such as ``[0].message.content``; with the character of a text.
        before, now: the text around it, or the values.
    """

    custom_id: str
    place: str
    before: str
    now: str


def first_difference(custom_id: str, before: Any, now: Any) -> Difference | None:
    """Return the first difference of two answers; None if they are the same."""
    for (place, one), (other_place, other) in zip_longest(
        _leaves(before), _leaves(now), fillvalue=("", None)
    ):
        if place != other_place:
            return Difference(custom_id, place or other_place, _shown(one), _shown(other))
        if isinstance(one, str) and isinstance(other, str) and one != other:
            pairs = enumerate(zip(one, other, strict=False))
            at = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
            around = slice(max(0, at - _AROUND), at + _AROUND)
            return Difference(custom_id, f"{place}, character {at + 1}", one[around], other[around])
        if one != other or type(one) is not type(other):
            return Difference(custom_id, place, _shown(one), _shown(other))
    return None


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name in sorted(value):
            yield from _leaves(value[name], f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value:
        for at, each in enumerate(value):
            yield from _leaves(each, f"{place}[{at}]")
    else:
        yield place, value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 2 * _AROUND else f"{text[: 2 * _AROUND]}..."


@dataclass(frozen=True)
class Agreement:
    """How many answers of a group were the same; ``share`` is None without any."""

    compared: int = 0
    identical: int = 0

    @property
    def share(self) -> float | None:
        """The share of identical answers."""
        return round(self.identical / self.compared, 6) if self.compared else None

    def plus(self, same: bool) -> Agreement:
        """Return the counts with one more pair."""
        return Agreement(self.compared + 1, self.identical + same)

    def to_json(self) -> dict[str, Any]:
        """Return the counts and the share."""
        return {**vars(self), "share": self.share}


@dataclass(frozen=True)
class Versions:
    """What gave the answers before and now; an empty list is unknown.

    Attributes:
        name: of a model, or ``engine``.
    """

    name: str
    before: tuple[str, ...]
    now: tuple[str, ...]

    @property
    def same(self) -> bool | None:
        """Whether they are the same; None if one of them is unknown."""
        return set(self.before) == set(self.now) if self.before and self.now else None

    def to_json(self) -> dict[str, Any]:
        """Return the versions as JSON."""
        return {**vars(self), "same": self.same}


@dataclass(frozen=True)
class Verification:
    """The outcome.

    Attributes:
        requests: of the sample.
        fixed: answers that should be the same: temperature 0, a seed, or no sampling at all.
        sampled: answers that were sampled without a seed, and may differ.
        failed: requests of the sample that failed this time.
        differences: the first few, of answers that should be the same.
    """

    requests: int
    fixed: Agreement
    sampled: Agreement
    failed: int
    models: tuple[Versions, ...]
    engine: Versions
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON."""
        return {
            "requests": self.requests,
            "fixed": self.fixed.to_json(),
            "sampled": self.sampled.to_json(),
            "failed": self.failed,
            "models": [each.to_json() for each in self.models],
            "engine": self.engine.to_json(),
            "differences": [vars(each) for each in self.differences],
        }


def verify(plan: Plan, run: RunDirectory, again: Plan, again_run: RunDirectory) -> Verification:
    """Compare the answers of a run with those of its sample that was asked again.

    Raises:
        ModelError: another model gave the new answers.
        StoppedError: results are missing.
    """
    before, now = _details(plan, run), _details(again, again_run)
    models = tuple(
        Versions(name, digests_of(plan, name, before), digests_of(again, name, now))
        for name in plan.models
    )
    for each in models:
        refuse_other_model(each)
    results = {request_key(raw): (raw, result) for raw, result in iterate_results(again, again_run)}
    fixed, sampled, failed = Agreement(), Agreement(), 0
    differences: list[Difference] = []
    for raw, result in iterate_results(plan, run):
        pair = results.get(request_key(raw))
        if pair is None:
            continue
        if pair[1].failed or result.failed:
            failed += 1
            continue
        found = _difference(raw, result, pair[1])
        if _is_sampled(raw, plan):
            sampled = sampled.plus(found is None)
            continue
        fixed = fixed.plus(found is None)
        if found is not None and len(differences) < _SHOWN:
            differences.append(found)
    engine = Versions("engine", _engines(before), _engines(now))
    return Verification(len(results), fixed, sampled, failed, models, engine, tuple(differences))


def _difference(raw: bytes, one: RawResult, other: RawResult) -> Difference | None:
    if one.body == other.body:
        return None
    return first_difference(custom_id_of(raw) or "", answer_of(one.body), answer_of(other.body))


def _is_sampled(raw: bytes, plan: Plan) -> bool:
    """Return whether an answer is drawn at random: no seed, and no temperature of 0."""
    entry = load_json(raw)
    body: Mapping[str, Any] = entry["body"]
    if entry.get("url") in WITHOUT_TEXT:
        return False
    served = plan.served_names[0] if len(plan.models) == 1 else str(body.get("model") or "")
    given = {**plan.options.parameters_of(served), **body}
    return given.get("seed") is None and given.get("temperature") != 0


def asked_model(metadata: Mapping[str, Any]) -> str:
    """Return the model that the request of a result named; servers may answer as another."""
    return str(metadata.get("requested_model") or metadata.get("model") or "")


def digests_of(plan: Plan, model: str, details: Sequence[StatusDetails]) -> tuple[str, ...]:
    """Return the digests of a model: those that the engines reported, or else the planned one."""
    names = {model, plan.served(model)}
    found = {digest for each in details for name, digest in each.model_digests.items()
             if name in names}  # fmt: skip
    return tuple(sorted(found or {plan.digest(model)} - {""}))


@dataclass(frozen=True)
class ModelResults:
    """The results of one model in a run's output.

    Attributes:
        name: as in the plan, or as the requests named it if it is none of the plan.
        digests: that the engines reported with the results; empty if they reported none.
    """

    name: str
    results: int
    digests: tuple[str, ...]


def results_by_model(
    plan: Plan, run: RunDirectory, accepts: Callable[[str, str], bool]
) -> tuple[ModelResults, ...]:
    """Return the models whose results are in the output, according to the journals.

    Models of the plan come first, also without results; results of adapters count as their
    model's. After ``--force-resume`` there can be models that the plan does not have.

    Args:
        accepts: compares names of models (``InputRules.accepts_model``).

    Raises:
        StoppedError: a result is missing, or the input is no longer the planned one.
    """
    counts: Counter[str] = Counter(dict.fromkeys(plan.models, 0))
    digests: dict[str, set[str]] = {}
    names: dict[str, str] = dict.fromkeys(plan.adapter_digests, plan.models[0])
    for _, result in iterate_results(plan, run):
        metadata = load_json(result.metadata)
        asked = asked_model(metadata)
        if asked not in names:
            names[asked] = plan.model_of(asked, accepts) or asked
        counts[names[asked]] += 1
        if "model_digest" in metadata:
            digests.setdefault(names[asked], set()).add(str(metadata["model_digest"]))
    return tuple(
        ModelResults(name, count, tuple(sorted(digests.get(name, ()))))
        for name, count in counts.items()
    )


def mixed_words(plan: Plan, models: Sequence[ModelResults]) -> str:
    """Return what is mixed in the results of a run; "" if nothing is."""
    others = [each.name for each in models if each.name not in plan.models and each.results]
    kinds = []
    if others:
        own = [each.name for each in models if each.name in plan.models and each.results]
        kinds.append(f"models ({joined([*own, *others])})")
    kinds += [
        f"versions of {each.name} ({joined([shown_digest(one) for one in each.digests])})"
        for each in models
        if len(each.digests) > 1
    ]
    if not kinds and any(each.identity != plan.identity for each in plan.earlier):
        kinds.append("settings")
    return f"results of different {joined(kinds)} are mixed" if kinds else ""


def refuse_mixed(plan: Plan, models: Sequence[ModelResults]) -> None:
    """Refuse a run whose requests cannot be asked again as they were.

    Raises:
        UsageError: its results are of several models, versions of a model, or settings.
    """
    mixed = mixed_words(plan, models)
    if mixed:
        raise UsageError(
            f"the run {user_output(plan.output)} cannot be verified: {mixed} (--force-resume)",
            "verify a run whose results all have one model and one set of parameters; "
            "aiflux report shows what is mixed",
        )


def refuse_other_model(found: Versions) -> None:
    """Refuse to compare answers of two versions of a model.

    Raises:
        ModelError: the digests differ.
    """
    if found.same is False:
        before, now = (" and ".join(map(shown_digest, each)) for each in (found.before, found.now))
        raise ModelError(
            f"the model {found.name} is not the one that gave the answers: it was {before}, and is "
            f"now {now}",
            "restore the earlier model; answers of another one show nothing about the run",
        )


def _details(plan: Plan, run: RunDirectory) -> list[StatusDetails]:
    statuses = (read_status(run, shard.index, plan) for shard in plan.shards)
    return [status.details for status in statuses if status is not None]


def _engines(details: Sequence[StatusDetails]) -> tuple[str, ...]:
    return tuple(sorted({e.version for each in details for e in each.engines if e.version}))


def verification_folder(plan: Plan) -> Path:
    """Return the folder of a run's sample, which is an ordinary run inside it."""
    return plan.output.with_name(f"{plan.output.name}{SUFFIX}")


def verification_file(plan: Plan) -> Path:
    """Return the file with the outcome of the last ``aiflux verify-run``."""
    return verification_folder(plan) / "verification.json"


def read_verification(plan: Plan) -> dict[str, Any] | None:
    """Return the outcome of the last ``aiflux verify-run`` of a run; None without one."""
    try:
        content = json.loads(verification_file(plan).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and content.get("planned") == plan.created
    return content if known and content.get("plan") == plan.id else None
