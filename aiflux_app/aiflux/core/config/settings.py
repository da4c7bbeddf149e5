"""Every setting a user can give: one table that the CLI, the environment and YAML files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from aiflux.errors import ConfigError
from aiflux.util import value_parsers
from aiflux.util.text import hidden_url, suggestion
from aiflux.util.value_parsers import Parser


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: key in YAML files and in Python; the option is ``--`` with dashes.
        section: ``run``, ``slurm`` or ``paths``: the block in YAML files.
        parse: turns a text or a YAML value into the setting's type; raises ValueError.
        env: environment name, if it has one.
        aliases: other names it is known by.
        decisive: whether it decides where prompts and keys go or what runs in the user's name.
    """

    name: str
    section: str
    parse: Parser
    default: Any
    help: str
    env: str | None = None
    aliases: tuple[str, ...] = ()
    decisive: bool = False

    @property
    def option(self) -> str:
        """The name of the command line option; it says the opposite of a default of True."""
        return self.options[0]

    @property
    def options(self) -> tuple[str, ...]:
        """Its options; those of a truth value have the opposite, which undoes a file's."""
        if isinstance(self.default, bool):
            name = self.name.replace("_", "-")
            both = (f"--{name}", f"--no-{name}")
            return both[::-1] if self.default else both
        return tuple("--" + name.replace("_", "-") for name in (self.name, *self.aliases))


def _run(name: str, parse: Parser, default: Any, help: str, **more: Any) -> Setting:
    return Setting(name, "run", parse, default, help, **more)


def _slurm(name: str, parse: Parser, default: Any, help: str, **more: Any) -> Setting:
    return Setting(name, "slurm", parse, default, help, **more)


def _paths(name: str, help: str, env: str | None = None, *, decisive: bool = False) -> Setting:
    return Setting(name, "paths", value_parsers.path, None, help, env, decisive=decisive)


SETTINGS: tuple[Setting, ...] = (
    _run("model", value_parsers.text, None, "model to run, as Ollama names it", env="MODEL_NAME"),
    _run(
        "concurrency",
        value_parsers.integer(1, 4096),
        None,
        "requests in flight per engine (default: slots and a few more)",
        env="BATCH_SIZE",
        aliases=("batch_size",),
    ),
    _run(
        "slots",
        value_parsers.integer(1, 1024),
        None,
        "sequences that an engine decodes in parallel",
    ),
    _run("context_length", value_parsers.integer(256), None, "tokens of context for each slot"),
    _run(
        "gpus_per_engine",
        value_parsers.integer(1, 64),
        1,
        "GPUs that one engine uses, for models that need it",
    ),
    _run(
        "engine_env",
        value_parsers.pairs,
        {},
        "KEY=VALUE set in the engine's environment (repeatable)",
        decisive=True,
    ),
    _run(
        "save_frequency",
        value_parsers.integer(1),
        64,
        "results after which the journal is synced to disk (and once a second)",
        env="SAVE_FREQUENCY",
    ),
    _run(
        "max_retries",
        value_parsers.integer(0, 1000),
        3,
        "further attempts for a request",
        env="MAX_RETRIES",
    ),
    _run(
        "retry_delay",
        value_parsers.number(0, 3600),
        1.0,
        "longest first wait before a retry; doubles",
        env="RETRY_DELAY",
    ),
    _run("request_timeout", value_parsers.number(0.1), 600.0, "seconds that one attempt may take"),
    _run(
        "validate",
        value_parsers.boolean,
        False,
        "check answers against the JSON Schema that their request asks for (response_format)",
    ),
    _run(
        "revalidate_attempts",
        value_parsers.integer(0, 1000),
        2,
        "times that an answer which does not fit its schema is asked for again",
    ),
    _run(
        "max_failures",
        value_parsers.failures,
        "0",
        "failed requests (a number or N%%) that still exit with 0",
    ),
    _run(
        "max_requeues",
        value_parsers.integer(0),
        20,
        "times that a job goes back to the queue by itself when its time is up",
    ),
    _run(
        "drain_seconds",
        value_parsers.number(0),
        30.0,
        "seconds that requests in flight get after a signal",
    ),
    _run(
        "max_tokens",
        value_parsers.integer(1),
        None,
        "tokens per answer, where the body has no limit",
        env="MAX_TOKENS",
    ),
    _run(
        "temperature",
        value_parsers.number(0, 100),
        None,
        "temperature, where the body has none",
        env="TEMPERATURE",
    ),
    _run("top_p", value_parsers.number(0, 1), None, "top_p, where the body has none", env="TOP_P"),
    _run("stop", value_parsers.texts, (), "text that ends an answer, where the body has no stop"),
    _run(
        "top_k",
        value_parsers.integer(0),
        None,
        "top_k, where the body has none (--engine-url only)",
        env="TOP_K",
    ),
    _run(
        "model_config",
        value_parsers.path,
        None,
        "a model's parameters, in a file FAMILY/SIZE.yaml of earlier versions",
    ),
    _run(
        "allow_cpu",
        value_parsers.boolean,
        False,
        "let the engine run on the CPU in a GPU job",
        env="AIFLUX_ALLOW_CPU",
    ),
    _run(
        "engine_url",
        value_parsers.url,
        None,
        "use this engine, which is already up",
        env="AIFLUX_ENGINE_URL",
        decisive=True,
    ),
    _run(
        "engine_wait",
        value_parsers.number(0),
        300.0,
        "seconds to wait for an engine at --engine-url that does not answer",
    ),
    _run(
        "engine_ca",
        value_parsers.path,
        None,
        "certificates to trust for an https:// --engine-url: a PEM file or a directory",
        env="AIFLUX_ENGINE_CA",
    ),
    _run(
        "load_timeout", value_parsers.number(1), 1800.0, "seconds that loading the model may take"
    ),
    _run(
        "retry_failed",
        value_parsers.boolean,
        False,
        "try failed requests of an earlier start again",
    ),
    _run(
        "log_level",
        value_parsers.level,
        "INFO",
        "WARNING and ERROR leave out progress; DEBUG has the engine log more",
        env="LOG_LEVEL",
    ),
    _slurm("account", value_parsers.text, None, "account to charge", env="SLURM_ACCOUNT"),
    _slurm("partition", value_parsers.text, None, "partition", env="SLURM_PARTITION"),
    _slurm("qos", value_parsers.text, None, "quality of service"),
    _slurm("nodes", value_parsers.integer(1), 1, "nodes of the job", env="SLURM_NODES"),
    _slurm(
        "gpus_per_node",
        value_parsers.gpus,
        "1",
        "GPUs, a number or TYPE:NUMBER; 0 for none",
        env="SLURM_GPUS_PER_NODE",
    ),
    _slurm("gres", value_parsers.text, None, "generic resources, instead of --gpus-per-node"),
    _slurm("constraint", value_parsers.text, None, "node features"),
    _slurm("time", value_parsers.walltime, "04:00:00", "time limit", env="SLURM_TIME"),
    _slurm(
        "mem",
        value_parsers.memory,
        "32G",
        "memory of the node",
        env="SLURM_MEM",
        aliases=("memory",),
    ),
    _slurm("cpus_per_task", value_parsers.integer(1), 4, "CPU cores", env="SLURM_CPUS_PER_TASK"),
    _slurm("mail_user", value_parsers.text, None, "address that Slurm writes to"),
    _slurm("mail_type", value_parsers.text, None, "events that Slurm writes of, such as END,FAIL"),
    _slurm("exclude", value_parsers.text, None, "nodes to keep away from"),
    _slurm("reservation", value_parsers.text, None, "reservation to use"),
    _slurm("shards", value_parsers.shards, 1, "jobs to cut the input into (an array), or auto"),
    _slurm("max_running", value_parsers.integer(1), None, "shards that may run at the same time"),
    _slurm(
        "sbatch_arg",
        value_parsers.pairs,
        {},
        "any other sbatch option as KEY=VALUE (repeatable)",
        decisive=True,
    ),
    _slurm(
        "seal",
        value_parsers.boolean,
        True,
        "when false (--no-seal), the container keeps the network while it works",
        env="AIFLUX_SEAL",
        decisive=True,
    ),
    _slurm(
        "modules", value_parsers.lines, (), "environment modules to load in the job", decisive=True
    ),
    _slurm(
        "setup",
        value_parsers.lines,
        (),
        "shell lines to run in the job before the container",
        decisive=True,
    ),
    _paths("data_dir", "where AI-Flux keeps its data", "AIFLUX_DATA_DIR", decisive=True),
    _paths(
        "models_dir",
        "where models lie (default: DATA_DIR/models)",
        "AIFLUX_MODELS_DIR",
        decisive=True,
    ),
    _paths("logs_dir", "where job logs go (default: the run directory)", "AIFLUX_LOGS_DIR"),
    _paths("containers_dir", "where images lie", "AIFLUX_CONTAINERS_DIR", decisive=True),
    _paths("image", "the image to run", "AIFLUX_IMAGE", decisive=True),
    _paths("models_file", "a catalogue of models that adds to AI-Flux's own", "AIFLUX_MODELS_FILE"),
)
# Variables of AI-Flux that are no settings: they hold from the environment only.
VARIABLES = frozenset(
    {
        "AIFLUX_SITE_CONFIG",
        "AIFLUX_API_KEY",
        "AIFLUX_OLLAMA",
        "AIFLUX_CACHE_DIR",
        "AIFLUX_SEALED",
        "AIFLUX_UNSEALED",
        "AIFLUX_IMAGE_CPU_ONLY",
    }
)
BY_NAME: Mapping[str, Setting] = {
    name: setting for setting in SETTINGS for name in (setting.name, *setting.aliases)
}
SECTIONS = tuple(dict.fromkeys(setting.section for setting in SETTINGS))


@cache
def section_settings(section: str) -> Mapping[str, Setting]:
    """Return the settings of a section by every name that they have."""
    return {name: item for name, item in BY_NAME.items() if item.section == section}


def known_setting(name: str, place: str, known: Mapping[str, Setting] = BY_NAME) -> Setting:
    """Return a setting by one of its names.

    Args:
        place: what the message begins with.

    Raises:
        ConfigError: there is none of that name; tells the nearest and all that there are.
    """
    if name not in known:
        raise ConfigError(f"{place}unknown setting {name!r}", suggestion(name, known))
    return known[name]


def refuse_two_names(given: Mapping[str, Any], place: Callable[[str], str]) -> None:
    """Refuse a setting that is given under two of its names.

    Args:
        given: values by names; None means not given.
        place: where a name stands, for the message.

    Raises:
        ConfigError: one is.
    """
    seen: dict[str, str] = {}
    for name in (name for name in given if name in BY_NAME and given[name] is not None):
        first = seen.setdefault(BY_NAME[name].name, name)
        if first != name:
            raise ConfigError(
                f"{place(name)}: {first} and {name} are names of one setting, and both are given",
                "leave one of them out",
            )


def elsewhere(name: str, otherwise: str) -> str:
    """Return the remedy for a setting in the wrong part of a YAML file, or another one."""
    if name not in BY_NAME:
        return otherwise
    section = BY_NAME[name].section
    return f"{name} belongs to the section {section}: write it below '{section}:', indented"


def parse_setting(setting: Setting, value: Any, place: str) -> Any:
    """Parse one value.

    Args:
        place: where the value stands, for the message.

    Raises:
        ConfigError: the value is wrong.
    """
    try:
        return setting.parse(value)
    except ValueError as error:
        shown = hidden_url(value) if setting.parse is value_parsers.url else value
        raise ConfigError(
            f"{place}: {setting.name} = {shown!r} is wrong", f"{setting.name} must be {error}"
        ) from None
