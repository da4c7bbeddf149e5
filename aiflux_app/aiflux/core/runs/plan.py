"""The plan of a run, `plan.json`: everything decided before the first request is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from aiflux import __version__
from aiflux.core.batch.input_file import (
    InputFacts,
    InputRules,
    InputSummary,
    quick_change_of,
)
from aiflux.core.batch.prompt_lengths import LongPrompts, PromptLimit
from aiflux.core.batch.request import EQUAL_ANSWERS, WITH_CHOICES
from aiflux.core.config.engine_command import command_words
from aiflux.core.config.engine_kinds import EXTERNAL
from aiflux.core.config.settings import SKIP, RunOptions
from aiflux.core.runs.directory import OUTPUT_SUFFIXES, RunDirectory
from aiflux.errors import ConfigError, InputError, ModelError, RunConflictError, StoppedError
from aiflux.models.name import parse_model_name, shown_digest
from aiflux.util.files import read_file, write_json
from aiflux.util.records import KEY, OMITTED, from_json, to_json
from aiflux.util.times import utc_now

# Of one modern GPU with a model of a few billion parameters and 16 slots; a pilot
# (`aiflux estimate`) measures it.
TOKENS_PER_SECOND = 1000
_SHARE_OF_WALLTIME = 0.5


@dataclass(frozen=True)
class Shard:
    """A contiguous part of the input.

    Attributes:
        start, end: byte offsets in the input, end excluded.
        first: index of its first request.
        requests: number of requests.
    """

    index: int
    start: int
    end: int
    first: int
    requests: int


def cut(summary: InputSummary, shards: int) -> tuple[Shard, ...]:
    """Cut the input into at most ``shards`` contiguous shards of about equal request counts."""
    marks = summary.marks
    wanted = max(1, min(shards, len(marks)))
    targets = [summary.requests * number // wanted for number in range(wanted)]
    starts = []
    position = 0
    for target in targets:
        while position + 1 < len(marks) and marks[position + 1].index <= target:
            position += 1
        starts.append(marks[position])
    starts = [mark for i, mark in enumerate(starts) if i == 0 or mark.index > starts[i - 1].index]
    ends = [*((mark.offset, mark.index) for mark in starts[1:]), (summary.size, summary.requests)]
    return tuple(
        Shard(index, mark.offset, end, mark.index, last - mark.index)
        for index, (mark, (end, last)) in enumerate(zip(starts, ends, strict=True))
    )


def auto_shards(summary: InputSummary, walltime: float) -> int:
    """Return a number of shards that each fit half of a job's time.

    Args:
        walltime: seconds that one job may take.
    """
    tokens = summary.requests * summary.mean_tokens
    seconds = tokens / TOKENS_PER_SECOND
    wanted = -(-seconds // (walltime * _SHARE_OF_WALLTIME))
    return max(1, min(int(wanted), summary.requests))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, which requests name as their model.

    Attributes:
        path: absolute path.
        digest: of its files when the run was planned.
        rank: of its largest matrices; 0 if unknown.
        base: the model that it was made for, as it names it; "" if it names none.
    """

    name: str
    path: str
    digest: str
    rank: int = 0
    base: str = ""

    def refuse_changed(self, found: Adapter) -> None:
        """Refuse an adapter that is not this one, which the run was planned with.

        Raises:
            ModelError: the digests differ; names both.
        """
        if self.digest != found.digest:
            raise _changed("adapter", self.name, self.digest, f"{self.path} is", found.digest)


def _changed(kind: str, name: str, planned: str, now: str, found: str) -> ModelError:
    return ModelError(
        f"the {kind} {name} changed since the run was planned: it was {shown_digest(planned)}, "
        f"and {now} now {shown_digest(found)}",
        f"restore the earlier {kind}, start a run with another output, or mix with the results so "
        "far: the same command with --force-resume",
    )


@dataclass(frozen=True)
class EarlierPlan:
    """What a plan that was replaced had, whose results may be part of the run.

    Attributes:
        identity: what the answers depended on (``Plan.identity``).
        digests: of its models by name, if they were known.
        engine_url: of a server that was already running.
    """

    id: str
    created: str
    identity: dict[str, Any]
    digests: dict[str, str]
    engine_url: str | None


PLAN_VERSION = 1
# Runs of these kinds keep the ids from before plans named their engine.
_UNNAMED = ("ollama", "external")


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first request is sent.

    Attributes:
        output: absolute path of the output.
        models: names as they were given, in the order in which they are processed.
        models_dir: directory of the models; None if they are the server's.
        served_names: names under which the engine serves the models.
        digests: of the models when the run was planned; "" for one that was not stored.
        adapters: of the run's only model.
        long_prompts: those that are too long for the context or leave little of it; None if all
            fit, or nothing is known about the model.
        lengths_at_start: a worker compares the prompts with the context once the server is up,
            because it could not be asked before.
        earlier: plans with other settings, whose results were kept.
    """

    input: InputFacts
    output: Path
    models: tuple[str, ...]
    options: RunOptions
    shards: tuple[Shard, ...]
    models_dir: Path | None
    created: str
    served_names: tuple[str, ...] = field(default=(), metadata={KEY: "served"})
    digests: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = field(default=(), metadata=OMITTED)
    long_prompts: LongPrompts | None = field(default=None, metadata=OMITTED)
    lengths_at_start: bool = field(default=False, metadata=OMITTED)
    earlier: tuple[EarlierPlan, ...] = field(default=(), metadata=OMITTED)
    aiflux: str = __version__
    version: int = PLAN_VERSION

    @property
    def input_path(self) -> Path:
        """The input's absolute path."""
        return self.input.path

    @property
    def requests(self) -> int:
        """Number of requests of the run."""
        return self.input.requests

    @property
    def left_out(self) -> int:
        """Number of requests that are not sent because their prompts are too long.

        0 if workers decide on them, which count those of their shards.
        """
        long = self.long_prompts
        if long is None or self.lengths_at_start or self.options.too_long != SKIP:
            return 0
        return long.too_long if long.counted else 0

    @property
    def keeps_left_out(self) -> bool:
        """Whether requests that were left out before stay so until a worker finds that they fit.

        A plan that knows the context decides on them itself.
        """
        options = self.options
        return self.lengths_at_start and options.too_long == SKIP and not options.retry_failed

    @property
    def allowed_failures(self) -> int:
        """Requests that may fail before the run counts as failed, with those that are left out."""
        return self.options.allowed_failures(self.requests) + self.left_out

    def served(self, model: str) -> str:
        """Return the name under which the engine serves one of the plan's models."""
        return self.served_names[self.models.index(model)]

    def digest(self, model: str) -> str:
        """Return the digest of one of the plan's models; "" if it is unknown."""
        return self.digests[self.models.index(model)] if self.digests else ""

    def model_of(self, named: str, accepts: Callable[[str, str], bool]) -> str | None:
        """Return the plan's model that a request names; None if it is none of them.

        Args:
            accepts: compares a model with a name (``InputRules.accepts_model``).
        """
        for model, served in zip(self.models, self.served_names, strict=True):
            if named in (model, served):
                return model
        return next((model for model in self.models if accepts(model, named)), None)

    def after(self, earlier: Plan) -> Plan:
        """Return this plan with the settings of the one it replaces, whose results are kept."""
        known, own = earlier._known_digests, self._known_digests
        url = earlier.options.engine_url
        if (
            earlier.identity == self.identity
            and url == self.options.engine_url
            and all(known[name] == own[name] for name in known.keys() & own)
        ):
            return replace(self, earlier=earlier.earlier)
        replaced = EarlierPlan(earlier.id, earlier.created, earlier.identity, known, url)
        return replace(self, earlier=(*earlier.earlier, replaced))

    @property
    def _known_digests(self) -> dict[str, str]:
        known = zip(self.served_names, self.digests, strict=False)
        return {name: digest for name, digest in known if digest}

    def refuse_changed_model(self, model: str, digest: str | None) -> None:
        """Refuse a model that is not the one that the run was planned with.

        Raises:
            ModelError: the digests differ; names both.
        """
        planned = self.digest(model)
        if planned and digest and planned != digest:
            raise _changed("model", model, planned, "is", digest)

    @property
    def adapter_digests(self) -> dict[str, str]:
        """The digest of each adapter by its name."""
        return {adapter.name: adapter.digest for adapter in self.adapters}

    @property
    def engine_settings(self) -> dict[str, Any]:
        """Settings of the engine's server that answers depend on, if they are set."""
        adapters = {adapter.name: adapter.path for adapter in self.adapters}
        return {**self.options.engine_settings, **({"lora": adapters} if adapters else {})}

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on in addition to the requests; fixed within a run."""
        identity: dict[str, Any] = {
            "models": [*self.served_names],
            "parameters": self.options.parameters,
            **self.options.engine_settings,
            "engine": self.options.engine,
        }
        if self.options.model_defaults:
            identity["defaults"] = self.options.model_defaults
        if self.adapters:
            identity["adapters"] = self.adapter_digests
        # Another command can start another server, or the same with options that change answers.
        if self.options.engine_command is not None:
            identity["command"] = command_words(self.options.engine_command)
        return identity

    @property
    def id(self) -> str:
        """Short digest of the input and of what the answers depend on."""
        identity = self.identity
        if identity["engine"] in _UNNAMED:
            del identity["engine"]
        content = json.dumps([self.input.digest, identity], sort_keys=True)
        return blake2b(content.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``plan.json``."""
        return {"version": self.version, "id": self.id, **to_json(self)}


def _refuse_tuning(options: RunOptions, kind: PlanningKind) -> None:
    """Refuse ``--tune`` where it has nothing to try.

    Raises:
        ConfigError: the number in flight is set, or the engine's slots are not ours.
    """
    if not options.tune:
        return
    if not kind.stores_models:
        raise ConfigError(
            "--tune starts the engine with other numbers of slots, which AI-Flux cannot do with "
            "this server; the worker finds its number of requests in flight in every run",
            "omit --tune (--no-tune, if a file or a variable sets it)",
        )
    if options.concurrency is not None:
        raise ConfigError(
            "--tune and --concurrency cannot be combined: one looks for the number of requests in "
            "flight, the other sets it",
            "give one of them (--no-tune, if a file or a variable sets it)",
        )


class PlanningKind(Protocol):
    """The part of an engine kind that planning needs.

    Attributes:
        managed: AI-Flux starts its servers.
        stores_models: AI-Flux stores its models in the models directory.
        spans_nodes: one of its servers can use several nodes.
        input_rules: for the check of the input.
    """

    managed: bool
    stores_models: bool
    spans_nodes: bool
    input_rules: InputRules

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse what the engine cannot do.

        Args:
            endpoints: number of requests for each url.

        Raises:
            ConfigError, InputError: an option, or the requests, do not suit it.
        """

    def served_name(self, model: str) -> str:
        """Return the name under which the engine serves a model.

        Raises:
            ConfigError: it is not a name of a model.
        """

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return one name for each model.

        Raises:
            ConfigError: a name is wrong, or asks for what the engine cannot do.
            InputError: the names of one model contradict each other.
        """

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return what identifies the files of a stored model; None if unknown.

        Raises:
            ModelError: its files cannot be read.
        """

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return the context of a model in a run, and its tokenizer; None if unknown."""

    def read_adapter(self, models_dir: Path | None, model: str, name: str, path: str) -> Adapter:
        """Return an adapter for a model, read from its files.

        Raises:
            ModelError: it cannot be read, or cannot be used with the model.
            ConfigError: the engine has no adapters.
        """


def input_rules(kind: PlanningKind, options: RunOptions) -> InputRules:
    """Return the rules for the input of a run with these options."""
    rules = kind.input_rules
    fields_ = {
        name: rule
        for name, rule in rules.ignored_fields.items()
        if not (rule.unless and getattr(options, rule.unless))
    }
    parameters = options.parameters
    return replace(
        rules,
        ignored_fields={**fields_, **EQUAL_ANSWERS},
        defaults={name: parameters[name] for name in ("n", "temperature") if name in parameters},
        adapters=frozenset(options.lora),
        replaces_model=options.replace_model,
    )


def refuse_options(options: RunOptions, kind: PlanningKind, endpoints: Mapping[str, int]) -> None:
    """Refuse options that contradict each other, or do not suit the engine.

    Args:
        endpoints: number of requests for each url.

    Raises:
        ConfigError, InputError: names the options.
    """
    if options.replace_model and not options.model:
        raise ConfigError("--replace-model needs a model", "name it with --model")
    _refuse_samples(options, endpoints)
    _refuse_nodes(options, kind)
    _refuse_tuning(options, kind)
    kind.refuse_run(options, endpoints)
    if options.model:
        kind.distinct_models([options.model])


def make_plan(
    summary: InputSummary,
    output: Path,
    options: RunOptions,
    models_dir: Path | None,
    kind: PlanningKind,
    shards: int = 1,
) -> Plan:
    """Decide on a run.

    Args:
        kind: of the engine that the options name.

    Raises:
        InputError: no model is named.
        ConfigError: a model's name is wrong, or an option does not suit the engine.
    """
    refuse_options(options, kind, summary.endpoints)
    named = [name for name in summary.models if name not in options.lora]
    names = [options.model] if options.model else named
    if not names:
        raise InputError("no request names a model, and --model was not given", "--model NAME:TAG")
    names = kind.distinct_models(names)
    served = tuple(kind.served_name(name) for name in names)
    folder = models_dir if kind.stores_models else None
    digests = [kind.model_digest(folder, name) if folder else None for name in names]
    return Plan(
        input=summary.facts,
        output=output,
        models=tuple(names),
        served_names=served,
        options=_with_defaults_of(served if kind.stores_models else (), options),
        shards=cut(summary, shards),
        digests=tuple(digest or "" for digest in digests),
        adapters=_adapters(options, names, folder, kind),
        models_dir=folder,
        created=utc_now(),
    )


def _refuse_samples(options: RunOptions, endpoints: Mapping[str, int]) -> None:
    """Refuse several answers to requests that have only one.

    Raises:
        InputError: no request of the input can have several.
    """
    if (options.samples or 1) > 1 and not WITH_CHOICES & endpoints.keys():
        raise InputError(
            f"samples = {options.samples}, but the requests are for {', '.join(endpoints)}, which "
            "gives one answer",
            "leave out --samples",
        )


def _refuse_nodes(options: RunOptions, kind: PlanningKind) -> None:
    """Refuse several nodes for an engine that uses one, and a part of their GPUs.

    Raises:
        ConfigError: the options ask for it.
    """
    nodes = options.nodes_per_engine
    if nodes > 1 and not kind.spans_nodes:
        raise ConfigError(
            f"nodes_per_engine = {nodes}, but the engine {options.engine} uses one node only",
            "use --engine vllm, or leave nodes_per_engine at 1",
        )
    if nodes > 1 and options.gpus_per_engine > 1:
        raise ConfigError(
            f"nodes_per_engine = {nodes} and gpus_per_engine = {options.gpus_per_engine}, but an "
            "engine on several nodes uses all GPUs of each",
            "leave gpus_per_engine out, and request the GPUs of each node with --gpus-per-node",
        )


def _adapters(
    options: RunOptions, models: Sequence[str], models_dir: Path | None, kind: PlanningKind
) -> tuple[Adapter, ...]:
    """Read the adapters of a run, which must have one model."""
    if not options.lora:
        return ()
    if len(models) > 1:
        raise InputError(
            f"--lora needs a run with one model; the requests name {', '.join(models)}",
            "name the model of the adapters with --model, and run the others separately",
        )
    for name in options.lora:
        if kind.input_rules.accepts_model(models[0], name):
            raise ConfigError(
                f"the adapter {name!r} has a name of the model {models[0]}",
                "choose another name: --lora NAME=PATH",
            )
    return tuple(
        kind.read_adapter(models_dir, models[0], name, path) for name, path in options.lora.items()
    )


def _with_defaults_of(served: Iterable[str], options: RunOptions) -> RunOptions:
    """Keep the default parameters of these models."""
    kept = {name.lower(): options.model_defaults.get(name.lower(), {}) for name in served}
    return replace(options, model_defaults={name: some for name, some in kept.items() if some})


def same_work(plan: Plan, other: Plan) -> bool:
    """Return whether two plans are equal except for the time at which they were made."""
    one, two = ({**each.to_json(), "created": ""} for each in (plan, other))
    return bool(json.loads(json.dumps(one)) == json.loads(json.dumps(two)))


def changed_input(plan: Plan, change: str) -> StoppedError:
    """Return the error for an input that changed after requests were sent.

    Args:
        change: see ``change_of``.
    """
    return StoppedError(
        f"the input {plan.input_path} {change}; no output was written",
        "every answer is kept in the journal: restore the input and run "
        f"`aiflux merge {quote(str(plan.output))}`, or run the same `aiflux run` command again: it "
        "sends only the changed requests",
    )


def refuse_changed_input(plan: Plan, consequence: str = "") -> None:
    """Refuse an input that is not the planned one; read it only if it may have changed.

    Args:
        consequence: end of the message's sentence.

    Raises:
        InputError: it is not, or cannot be read.
    """
    change = quick_change_of(plan.input)
    if change is not None:
        raise InputError(
            f"the input {plan.input_path} {change}{consequence}",
            "restore it, or run the same `aiflux run` command again: it plans again and sends only "
            "what changed",
        )


def write_plan(plan: Plan, run: RunDirectory) -> None:
    """Write ``plan.json`` into the run directory, which is created if it does not exist."""
    run.create()
    write_json(run.plan, plan.to_json())


_OTHER_VERSION = (
    "finish the run with the AI-Flux that began it, or build the image again (make image) if it is "
    "older than the command, or choose another output"
)


def read_plan(run: RunDirectory) -> Plan:
    """Read ``plan.json``.

    Raises:
        RunConflictError: there is none, or it is not a plan that this version understands.
        StorageError: it cannot be read.
    """
    written = read_file(run.plan)
    if written is None:
        raise RunConflictError(f"there is no plan at {run.plan}", "check the path of the run")
    try:
        content = json.loads(written)
        if content["version"] != PLAN_VERSION:
            raise RunConflictError(
                f"{run.plan} is a plan of version {content['version']}; this is {PLAN_VERSION}",
                _OTHER_VERSION,
            )
        strange = content["options"].keys() - {item.name for item in fields(RunOptions)}
        if strange:
            raise RunConflictError(
                f"{run.plan} was made by another AI-Flux ({content['aiflux']}; this is "
                f"{__version__}): options {', '.join(sorted(strange))} are not known here",
                _OTHER_VERSION,
            )
        return _from_json(content)
    except ConfigError as error:
        raise RunConflictError(
            f"{run.plan} was made by another AI-Flux, or is damaged: {error.message}",
            _OTHER_VERSION,
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunConflictError(
            f"{run.plan} is damaged, or not a plan: {error!r}",
            "the results so far are in the journal next to it: move the run directory away "
            f"(mv {quote(str(run.path))} ELSEWHERE), or choose another output",
        ) from error


def read_known_part(run: RunDirectory) -> Plan | None:
    """Return a plan that ``read_plan`` refuses, without the options that are not known here.

    Returns:
        what suffices to write a status; None if that is not possible, or the plan's id is another.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        content = json.loads(read_file(run.plan) or b"")
        plan = _from_json(content)
        return plan if plan.id == content["id"] else None
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _from_json(content: dict[str, Any]) -> Plan:
    plan = from_json(Plan, content)
    if not (plan.shards and plan.input.endpoints and plan.models):
        raise ValueError("a part of it is missing")
    if not plan.output.is_absolute() or plan.output.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{plan.output} is not the path of an output")
    plan.options.allowed_failures(1)  # a ValueError where it is not a number
    _refuse_gaps(plan.shards, plan.requests)
    if not plan.served_names:  # a plan from before these names were stored
        served = tuple(_served_before(name, plan.options) for name in plan.models)
        plan = replace(plan, served_names=served)
    if len(plan.served_names) != len(plan.models):
        raise ValueError("models and served differ in length")
    if plan.digests and len(plan.digests) != len(plan.models):
        raise ValueError("models and digests differ in length")
    return plan


def _served_before(name: str, options: RunOptions) -> str:
    return name if options.engine == EXTERNAL else parse_model_name(name).served


def _refuse_gaps(shards: tuple[Shard, ...], requests: int) -> None:
    """Raise ValueError unless the shards follow one another and hold all requests."""
    position = first = 0
    for index, shard in enumerate(shards):
        follows = (shard.index, shard.first) == (index, first) and shard.requests > 0
        if not follows or not position <= shard.start < shard.end:
            raise ValueError(f"its shard {index} does not follow the one before")
        position, first = shard.end, first + shard.requests
    if first != requests:
        raise ValueError("its shards do not hold all requests")
