"""Every setting a user can give: one table that the CLI, the environment and YAML files share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.errors import ConfigError

Parser = Callable[[Any], Any]


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: key in YAML files and in Python; the option is ``--`` with dashes.
        section: ``run``, ``slurm`` or ``paths``: the block in YAML files.
        parse: turns a text or a YAML value into the setting's type; raises ValueError.
        env: environment name, if it has one.
        aliases: other names it is known by.
    """

    name: str
    section: str
    parse: Parser
    default: Any
    help: str
    env: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """The name of the command line option; it says the opposite of a default of True."""
        return ("--no-" if self.default is True else "--") + self.name.replace("_", "-")


def _text(value: Any) -> str:
    if isinstance(value, bool | dict | list) or str(value).strip() == "":
        raise ValueError("a text")
    text = str(value)
    if "\n" in text:
        raise ValueError("a text of one line")
    return text


def _integer(low: int, high: int | None = None) -> Parser:
    wanted = f"a whole number of at least {low}" + (f" and at most {high}" if high else "")

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value).strip()):
            raise ValueError(wanted)
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError(wanted)
        return number

    return parse


def _number(low: float, high: float | None = None) -> Parser:
    wanted = f"a number of at least {low:g}" + (f" and at most {high:g}" if high else "")

    def parse(value: Any) -> float:
        try:
            number = float("x" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ValueError(wanted) from None
        if not low <= number <= (float("inf") if high is None else high):
            raise ValueError(wanted)
        return number

    return parse


def _boolean(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "on": True}
    words |= {"false": False, "no": False, "0": False, "off": False}
    text = str(value).strip().lower()
    if text not in words:
        raise ValueError("true or false")
    return words[text]


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _url(value: Any) -> str:
    text = _text(value).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise ValueError("an address such as http://127.0.0.1:8000")
    return text.removesuffix("/v1")


_WALLTIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)\Z", re.IGNORECASE)


def _walltime(value: Any) -> str:
    # An unquoted 01:30:00 is a base-60 integer in YAML 1.1; minutes are what Slurm reads there.
    text = _text(value)
    if not _WALLTIME.match(text):
        raise ValueError("a Slurm time such as 30, 04:00:00 or 1-12:00:00 (quote it in YAML)")
    return text


def _memory(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"\d+[KMGTkmgt]?[Bb]?", text):
        raise ValueError("a memory size such as 32G")
    return text.upper().removesuffix("B")


def _failures(value: Any) -> str:
    text = _text(value).strip()
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise ValueError("a number of requests such as 10, or a percentage such as 2%")
    return text


def _shards(value: Any) -> int | str:
    text = str(value).strip().lower()
    if text == "auto":
        return text
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError("a whole number of at least 1, or auto")
    return int(text)


def _pairs(value: Any) -> dict[str, str]:
    """Accept a mapping, ``KEY=VALUE``, or a list of ``KEY=VALUE``; a bare KEY is a flag."""
    if isinstance(value, dict):
        return {_text(key): "" if item is None else str(item) for key, item in value.items()}
    items = value if isinstance(value, list | tuple) else [value]
    pairs = (_text(item).partition("=") for item in items)
    return {key.strip().removeprefix("--"): item for key, _, item in pairs}


def _lines(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_text(item) for item in items)


def _level(value: Any) -> str:
    text = str(value).upper()
    if text not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("DEBUG, INFO, WARNING or ERROR")
    return text


def _run(name: str, parse: Parser, default: Any, help: str, **more: Any) -> Setting:
    return Setting(name, "run", parse, default, help, **more)


def _slurm(name: str, parse: Parser, default: Any, help: str, **more: Any) -> Setting:
    return Setting(name, "slurm", parse, default, help, **more)


def _paths(name: str, help: str, env: str) -> Setting:
    return Setting(name, "paths", _path, None, help, env)


SETTINGS: tuple[Setting, ...] = (
    _run("model", _text, None, "model to run, as Ollama names it", env="MODEL_NAME"),
    _run(
        "concurrency",
        _integer(1, 4096),
        None,
        "requests in flight per engine (default: slots and a few more)",
        env="BATCH_SIZE",
        aliases=("batch_size",),
    ),
    _run("slots", _integer(1, 1024), None, "sequences that an engine decodes in parallel"),
    _run("context_length", _integer(256), None, "tokens of context for each slot"),
    _run(
        "gpus_per_engine", _integer(1, 64), 1, "GPUs that one engine uses, for models that need it"
    ),
    _run("engine_env", _pairs, {}, "KEY=VALUE set in the engine's environment (repeatable)"),
    _run(
        "save_frequency",
        _integer(1),
        64,
        "results after which the journal is synced to disk (and once a second)",
        env="SAVE_FREQUENCY",
    ),
    _run("max_retries", _integer(0, 1000), 3, "further attempts for a request", env="MAX_RETRIES"),
    _run(
        "retry_delay",
        _number(0, 3600),
        1.0,
        "longest first wait before a retry; doubles",
        env="RETRY_DELAY",
    ),
    _run("request_timeout", _number(0.1), 600.0, "seconds that one attempt may take"),
    _run(
        "validate",
        _boolean,
        False,
        "check answers against the JSON Schema that their request asks for (response_format)",
    ),
    _run(
        "revalidate_attempts",
        _integer(0, 1000),
        2,
        "times that an answer which does not fit its schema is asked for again",
    ),
    _run(
        "max_failures", _failures, "0", "failed requests (a number or N%%) that still exit with 0"
    ),
    _run(
        "max_requeues",
        _integer(0),
        20,
        "times that a job goes back to the queue by itself when its time is up",
    ),
    _run("drain_seconds", _number(0), 30.0, "seconds that requests in flight get after a signal"),
    _run(
        "max_tokens",
        _integer(1),
        None,
        "tokens per answer, where the body has no limit",
        env="MAX_TOKENS",
    ),
    _run(
        "temperature",
        _number(0, 100),
        None,
        "temperature, where the body has none",
        env="TEMPERATURE",
    ),
    _run("top_p", _number(0, 1), None, "top_p, where the body has none", env="TOP_P"),
    _run(
        "top_k",
        _integer(0),
        None,
        "top_k, where the body has none (--engine-url only)",
        env="TOP_K",
    ),
    _run(
        "allow_cpu",
        _boolean,
        False,
        "let the engine run on the CPU in a GPU job",
        env="AIFLUX_ALLOW_CPU",
    ),
    _run("engine_url", _url, None, "use this engine, which is already up", env="AIFLUX_ENGINE_URL"),
    _run(
        "engine_wait",
        _number(0),
        300.0,
        "seconds to wait for an engine at --engine-url that does not answer",
    ),
    _run("load_timeout", _number(1), 1800.0, "seconds that loading the model may take"),
    _run("retry_failed", _boolean, False, "try failed requests of an earlier start again"),
    _run(
        "log_level",
        _level,
        "INFO",
        "WARNING and ERROR leave out progress; DEBUG has the engine log more",
        env="LOG_LEVEL",
    ),
    _slurm("account", _text, None, "account to charge", env="SLURM_ACCOUNT"),
    _slurm("partition", _text, None, "partition", env="SLURM_PARTITION"),
    _slurm("qos", _text, None, "quality of service"),
    _slurm("nodes", _integer(1), 1, "nodes of the job", env="SLURM_NODES"),
    _slurm(
        "gpus_per_node",
        _text,
        "1",
        "GPUs, a number or TYPE:NUMBER; 0 for none",
        env="SLURM_GPUS_PER_NODE",
    ),
    _slurm("gres", _text, None, "generic resources, instead of --gpus-per-node"),
    _slurm("constraint", _text, None, "node features"),
    _slurm("time", _walltime, "04:00:00", "time limit", env="SLURM_TIME"),
    _slurm("mem", _memory, "32G", "memory of the node", env="SLURM_MEM", aliases=("memory",)),
    _slurm("cpus_per_task", _integer(1), 4, "CPU cores", env="SLURM_CPUS_PER_TASK"),
    _slurm("mail_user", _text, None, "address that Slurm writes to"),
    _slurm("mail_type", _text, None, "events that Slurm writes of, such as END,FAIL"),
    _slurm("exclude", _text, None, "nodes to keep away from"),
    _slurm("reservation", _text, None, "reservation to use"),
    _slurm("shards", _shards, 1, "jobs to cut the input into (an array), or auto"),
    _slurm("max_running", _integer(1), None, "shards that may run at the same time"),
    _slurm("sbatch_arg", _pairs, {}, "any other sbatch option as KEY=VALUE (repeatable)"),
    _slurm(
        "seal",
        _boolean,
        True,
        "let the container that works keep the network (the status says so)",
        env="AIFLUX_SEAL",
    ),
    _slurm("modules", _lines, (), "environment modules to load in the job"),
    _slurm("setup", _lines, (), "shell lines to run in the job before the container"),
    _paths("data_dir", "where AI-Flux keeps its data", "AIFLUX_DATA_DIR"),
    _paths("models_dir", "where models lie (default: DATA_DIR/models)", "AIFLUX_MODELS_DIR"),
    _paths("logs_dir", "where job logs go (default: the run directory)", "AIFLUX_LOGS_DIR"),
    _paths("containers_dir", "where images lie", "AIFLUX_CONTAINERS_DIR"),
    _paths("image", "the image to run", "AIFLUX_IMAGE"),
)
BY_NAME: Mapping[str, Setting] = {
    name: setting for setting in SETTINGS for name in (setting.name, *setting.aliases)
}


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
        raise ConfigError(
            f"{setting.name} = {value!r} in {place} is wrong", f"{setting.name} must be {error}"
        ) from None
