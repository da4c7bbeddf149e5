"""The settings: options of a run, resources of Slurm, and the table of all settings.

The command line, the environment and YAML files share the table. `RunOptions` is part of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any

from aiflux.core.config.declaration import (
    Setting,
    by_every_name,
    declared_settings,
    known_setting,
    parse_setting,
    refuse_two_names,
    setting,
)
from aiflux.core.config.engine_command import engine_command
from aiflux.core.config.engine_kinds import CHOICES, kind_name
from aiflux.errors import ConfigError
from aiflux.models.endpoints import MAX_ANSWERS
from aiflux.util import value_parsers as parse
from aiflux.util.text import suggestion
from aiflux.util.times import walltime_seconds

NVIDIA, AMD = "nvidia", "amd"
VENDOR_TITLES = {NVIDIA: "NVIDIA", AMD: "AMD"}
"""The vendors of GPUs, with their names in messages."""

_MOST_TOKENS = 2**31 - 1  # llama-server fails with more
FAIL, SKIP, SEND, CHUNK = "fail", "skip", "send", "chunk"
"""What to do if prompts are longer than the context: refuse the run, leave them out, nothing, or
send them in parts."""
LEFT_OUT = ("time", "mem", "cpus_per_task")
"""Settings whose null omits their directive; for the others it means "not set here"."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is processed. Times are seconds; None leaves the choice to the worker.

    Attributes:
        model_defaults: default parameters of the catalog by served model name; in a plan, those of
            its models. They fill in only what is left open.
    """

    model: str | None = setting(
        parse.text,
        None,
        "Model to run, such as llama3.2:3b",
        short="-m",
        metavar="NAME:TAG",
        env="MODEL_NAME",
        common=True,
    )
    concurrency: int | None = setting(
        parse.integer(1, 4096),
        None,
        "Requests in flight per engine (default: slots and a few more)",
        env="BATCH_SIZE",
        aliases=("batch_size",),
    )
    slots: int | None = setting(
        parse.integer(1, 1024), None, "Sequences that an engine decodes in parallel"
    )
    context_length: int | None = setting(
        parse.integer(256, _MOST_TOKENS), None, "Tokens of context for each slot"
    )
    tune: bool = setting(
        parse.boolean,
        False,
        "Try several numbers of requests in flight and slots at the start; keep the best",
        env="AIFLUX_TUNE",
    )
    engine: str = setting(
        parse.choice(*CHOICES),
        CHOICES[0],
        f"Engine to start: {', '.join(CHOICES)}",
        metavar="KIND",
        env="AIFLUX_ENGINE",
    )
    engine_command: str | None = setting(
        engine_command,
        None,
        "Start this server instead, such as 'vllm serve {model} --uds {socket}'",
        metavar="COMMAND",
        env="AIFLUX_ENGINE_COMMAND",
        decisive=True,
    )
    gpus_per_engine: int = setting(
        parse.integer(1, 64), 1, "GPUs for each engine, for models that need several"
    )
    nodes_per_engine: int = setting(
        parse.integer(1, 64),
        1,
        "Nodes for each engine, with all their GPUs, for models that need several (vllm only)",
        env="AIFLUX_NODES_PER_ENGINE",
    )
    engine_env: dict[str, str] = setting(
        parse.variables,
        {},
        "Environment variable of the engine (repeatable)",
        metavar="KEY=VALUE",
        repeatable=True,
        decisive=True,
    )
    engine_arg: dict[str, str] = setting(
        parse.options,
        {},
        "Option of the engine's server; KEY alone is a flag (repeatable)",
        metavar="KEY[=VALUE]",
        env="AIFLUX_ENGINE_ARG",
        repeatable=True,
        decisive=True,
    )
    lora: dict[str, str] = setting(
        parse.named_paths,
        {},
        "LoRA adapter that requests name as their model (repeatable)",
        metavar="NAME=PATH",
        env="AIFLUX_LORA",
        repeatable=True,
    )
    tool_parser: str | None = setting(
        parse.text,
        None,
        "Parser of the model's tool calls in vLLM, such as hermes",
        metavar="NAME",
        env="AIFLUX_TOOL_PARSER",
    )
    reasoning_parser: str | None = setting(
        parse.text,
        None,
        "Parser of the model's reasoning in vLLM, or its format in llama.cpp",
        metavar="NAME",
        env="AIFLUX_REASONING_PARSER",
    )
    replace_model: bool = setting(
        parse.boolean, False, "Send requests that name another model to --model, too"
    )
    save_frequency: int = setting(
        parse.integer(1),
        64,
        "Sync the journal to disk after this number of results, or every second",
        env="SAVE_FREQUENCY",
    )
    max_retries: int = setting(
        parse.integer(0, 1000), 3, "Retries of a failed request", env="MAX_RETRIES"
    )
    retry_delay: float = setting(
        parse.number(0, 3600),
        1.0,
        "Longest wait before the first retry; doubles with each retry",
        metavar="SECONDS",
        env="RETRY_DELAY",
    )
    request_timeout: float = setting(
        parse.number(0.1), 600.0, "Time limit of one attempt", metavar="SECONDS"
    )
    validate: bool = setting(
        parse.boolean,
        False,
        "Check answers against their request's JSON Schema",
        common=True,
    )
    revalidate_attempts: int = setting(
        parse.integer(0, 1000), 2, "Retries of an answer that does not match its schema"
    )
    max_failures: str = setting(
        parse.failures,
        "0",
        "Failed requests allowed, N or N%",
        metavar="N|N%",
        common=True,
    )
    too_long: str = setting(
        parse.choice(FAIL, SKIP, SEND, CHUNK),
        FAIL,
        "What to do if prompts are longer than the context: fail, skip, send or chunk",
        metavar="WHAT",
        env="AIFLUX_TOO_LONG",
    )
    max_requeues: int = setting(
        parse.integer(0), 20, "Times that a job requeues itself when its time is up"
    )
    drain_seconds: float = setting(
        parse.number(0),
        20.0,  # Slurm kills a cancelled job after KillWait, 30 s by default
        "Time that requests in flight get to finish after a signal",
        metavar="SECONDS",
    )
    max_tokens: int | None = setting(
        parse.integer(1),
        None,
        "Tokens per answer, for requests without a limit",
        env="MAX_TOKENS",
        common=True,
    )
    samples: int | None = setting(
        parse.integer(1, MAX_ANSWERS),
        None,
        "Answers to each request, for requests without n",
        env="AIFLUX_SAMPLES",
    )
    temperature: float | None = setting(
        parse.number(0, 100),
        None,
        "Temperature, for requests without one",
        metavar="T",
        env="TEMPERATURE",
    )
    top_p: float | None = setting(
        parse.number(0, 1),
        None,
        "Value of top_p, for requests without one",
        metavar="P",
        env="TOP_P",
    )
    top_k: int | None = setting(
        parse.integer(0),
        None,
        "Value of top_k, for requests without one (not with Ollama)",
        env="TOP_K",
    )
    stop: tuple[str, ...] = setting(
        parse.texts,
        (),
        "Text that ends an answer, for requests without stop (repeatable)",
        metavar="TEXT",
        repeatable=True,
    )
    allow_cpu: bool = setting(
        parse.boolean,
        False,
        "Let the engine run on the CPU in a GPU job",
        env="AIFLUX_ALLOW_CPU",
    )
    engine_url: str | None = setting(
        parse.url,
        None,
        "Use a running server, or serve:NAME",
        metavar="URL",
        env="AIFLUX_ENGINE_URL",
        common=True,
        decisive=True,
    )
    engine_wait: float = setting(
        parse.number(0),
        300.0,
        "Time to wait for a server at --engine-url that does not respond",
        metavar="SECONDS",
    )
    engine_ca: str | None = setting(
        parse.path,
        None,
        "CA certificates for an https:// --engine-url: a PEM file or a directory",
        metavar="PATH",
        env="AIFLUX_ENGINE_CA",
        decisive=True,
    )
    load_timeout: float = setting(
        parse.number(1), 1800.0, "Time limit of loading the model", metavar="SECONDS"
    )
    retry_failed: bool = setting(
        parse.boolean, False, "Retry the failed requests of an earlier start", common=True
    )
    log_level: str = setting(
        parse.level,
        "INFO",
        "WARNING and ERROR hide the progress; DEBUG adds the engine's debug log",
        metavar="LEVEL",
        env="LOG_LEVEL",
    )
    model_defaults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))  # JSON has lists only
        if self.engine_ca is not None:
            object.__setattr__(self, "engine_ca", str(self.engine_ca))  # and no paths
        if self.engine_url is not None and self.engine_command is not None:
            raise ConfigError(
                "engine_url and engine_command are both set, but a run has one kind of engine",
                "omit one of them",
            )
        kind = kind_name(self.engine, self.engine_url, self.engine_command)
        object.__setattr__(self, "engine", kind)
        if self.engine_url is None and self.engine_command is None and kind not in CHOICES:
            raise ConfigError(
                f"engine = {self.engine!r} is wrong", suggestion(self.engine, CHOICES)
            )

    @property
    def engine_settings(self) -> dict[str, Any]:
        """Settings of the engine's server that answers depend on, if they are set."""
        names = ("engine_arg", "tool_parser", "reasoning_parser")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def parameters(self) -> dict[str, Any]:
        """Fields that are filled into bodies without them."""
        names = ("max_tokens", "temperature", "top_p", "top_k")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.samples is not None:
            given["n"] = self.samples
        return {**given, "stop": [*self.stop]} if self.stop else given

    def parameters_of(self, served: str) -> dict[str, Any]:
        """Return the same for one model, including the model's defaults."""
        return {**self.model_defaults.get(served.lower(), {}), **self.parameters}

    @property
    def advised(self) -> dict[str, dict[str, Any]]:
        """The default parameters of each model that the run leaves open."""
        return left_open(self.model_defaults, self.parameters)

    def allowed_failures(self, requests: int) -> int:
        """Return how many of ``requests`` may fail before the run counts as failed."""
        if self.max_failures.endswith("%"):
            return int(requests * float(self.max_failures[:-1]) / 100)
        return int(self.max_failures)

    def to_json(self) -> dict[str, Any]:
        """Return the options for the plan."""
        return asdict(self)


def settings_texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings for a line of text, as options of the command line."""
    return [
        f"--{name.replace('_', '-')} {each}"
        for name, value in settings.items()
        for each in (_pair_texts(value) if isinstance(value, Mapping) else [value])
    ]


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line; None means not given."""
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        values = _pair_texts(value) if isinstance(value, Mapping) else value
        for each in values if isinstance(values, list | tuple) else [values]:
            if each is not None:
                text = str(each)
                words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return words


def _pair_texts(pairs: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" if value else key for key, value in pairs.items()]


def left_open(
    defaults: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the defaults of each model that the given parameters do not replace."""
    left = {
        model: {name: value for name, value in values.items() if name not in given}
        for model, values in defaults.items()
    }
    return {model: values for model, values in left.items() if values}


@dataclass(init=False)
class SlurmConfig:
    """The resources that are requested from Slurm; fields are keywords, or assigned later.

    Each value is checked when it is given, and is then of the field's type. None leaves the
    directive out, or takes the default where there has to be a value.

    Raises:
        ConfigError: a value is wrong, or a name unknown; names the field and what it must be.
    """

    account: str | None = setting(
        parse.text, None, "Account to charge", metavar="NAME", env="SLURM_ACCOUNT", common=True
    )
    partition: str | None = setting(
        parse.text, None, "Partition", metavar="NAME", env="SLURM_PARTITION", common=True
    )
    qos: str | None = setting(parse.text, None, "Quality of service", metavar="NAME")
    nodes: int = setting(
        parse.integer(1), 1, "Nodes of a job; only 1 is possible", env="SLURM_NODES", offered=False
    )
    gpus_per_node: str = setting(
        parse.gpus,
        "1",
        "GPUs; 0 for none",
        metavar="N|TYPE:N",
        env="SLURM_GPUS_PER_NODE",
        common=True,
    )
    gres: str | None = setting(
        parse.text, None, "Generic resources, instead of --gpus-per-node", metavar="LIST"
    )
    gpu_vendor: str = setting(
        parse.choice("auto", NVIDIA, AMD),
        "auto",
        "Vendor of the GPUs: nvidia, amd, or auto for that of the node",
        metavar="NAME",
        env="AIFLUX_GPU_VENDOR",
    )
    constraint: str | None = setting(parse.text, None, "Required node features", metavar="LIST")
    time: str | None = setting(
        parse.walltime, "04:00:00", "Time limit", metavar="TIME", env="SLURM_TIME", common=True
    )
    time_min: str | None = setting(
        parse.walltime,
        None,
        "Shortest time limit that Slurm may set to start the job earlier",
        metavar="TIME",
    )
    mem: str | None = setting(
        parse.memory,
        "32G",
        "Memory per node",
        metavar="SIZE",
        env="SLURM_MEM",
        aliases=("memory",),
        common=True,
    )
    cpus_per_task: int | None = setting(parse.integer(1), 4, "CPU cores", env="SLURM_CPUS_PER_TASK")
    mail_user: str | None = setting(
        parse.text, None, "Address for Slurm's mails", metavar="ADDRESS"
    )
    mail_type: str | None = setting(
        parse.text, None, "Events that Slurm sends mails about, such as END,FAIL", metavar="LIST"
    )
    exclude: str | None = setting(parse.text, None, "Nodes not to use", metavar="NODES")
    reservation: str | None = setting(parse.text, None, "Reservation to use", metavar="NAME")
    shards: int | str = setting(
        parse.shards,
        1,
        "Jobs to split the input into",
        metavar="N|auto",
        common=True,
    )
    max_running: int | None = setting(
        parse.integer(1), None, "Shards that may run at the same time"
    )
    sbatch_arg: dict[str, str] = setting(
        parse.pairs,
        {},
        "Any other sbatch option (repeatable)",
        metavar="KEY=VALUE",
        repeatable=True,
        decisive=True,
    )
    seal: bool = setting(
        parse.boolean,
        True,
        "Process requests without network access; --no-seal keeps the network",
        env="AIFLUX_SEAL",
        decisive=True,
    )
    modules: tuple[str, ...] = setting(
        parse.lines,
        (),
        "Environment module to load in the job (repeatable)",
        metavar="NAME",
        repeatable=True,
        decisive=True,
    )
    setup: tuple[str, ...] = setting(
        parse.lines,
        (),
        "Shell line to run in the job before the work (repeatable)",
        metavar="LINE",
        repeatable=True,
        decisive=True,
    )

    def __init__(self, **values: Any) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _default(item.name))
        refuse_two_names(values, lambda _: "SlurmConfig", _settings())
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        known = known_setting(name, "SlurmConfig: ", _settings())
        parsed = parse_setting(known, value, "SlurmConfig") if value is not None else None
        if parsed is None and known.name not in LEFT_OUT:
            parsed = _default(known.name)
        object.__setattr__(self, known.name, parsed)

    @property
    def memory(self) -> str | None:
        """Another name for ``mem``."""
        return self.mem

    @memory.setter
    def memory(self, value: str | None) -> None:
        self.mem = value

    def checked(self) -> SlurmConfig:
        """Return a copy whose values fit together.

        Raises:
            ConfigError: they do not.
        """
        if self.nodes != 1:
            raise ConfigError(
                f"nodes = {self.nodes}: one job uses one node, or those of --nodes-per-engine",
                "leave --nodes at 1; use more GPUs of a node with --gpus-per-node, and several "
                "nodes for one model with --nodes-per-engine",
            )
        if self.time_min and walltime_seconds(self.time_min) > walltime_seconds(self.time):
            raise ConfigError(
                f"time_min = {self.time_min} is more than the time limit {self.time}",
                "give --time-min less than --time, or leave it out",
            )
        checked = SlurmConfig(**{item.name: getattr(self, item.name) for item in fields(self)})
        if checked.gres is not None and self.gpus_per_node == SlurmConfig.gpus_per_node:
            checked.gpus_per_node = "0"
        return checked


@cache
def _settings() -> Mapping[str, Setting]:
    return by_every_name(declared_settings(SlurmConfig, "slurm"))


def _default(name: str) -> Any:
    (item,) = (item for item in fields(SlurmConfig) if item.name == name)
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None


def _path(name: str, section: str, help: str, **more: Any) -> Setting:
    return Setting(name, section, parse.path, None, help, metavar="PATH", **more)


SETTINGS: tuple[Setting, ...] = (
    *declared_settings(RunOptions, "run"),
    _path(
        "model_config", "run", "Model parameters, in a FAMILY/SIZE.yaml file of earlier versions"
    ),
    *declared_settings(SlurmConfig, "slurm"),
    _path("data_dir", "paths", "Directory of AI-Flux's data", env="AIFLUX_DATA_DIR", decisive=True),
    _path(
        "models_dir",
        "paths",
        "Directory of the models (default: DATA_DIR/models)",
        env="AIFLUX_MODELS_DIR",
        decisive=True,
    ),
    _path(
        "logs_dir",
        "paths",
        "Directory of the job logs (default: the run directory)",
        env="AIFLUX_LOGS_DIR",
    ),
    _path(
        "containers_dir",
        "paths",
        "Directory of the images (default: DATA_DIR/containers)",
        env="AIFLUX_CONTAINERS_DIR",
        decisive=True,
    ),
    _path("image", "paths", "Image to run", env="AIFLUX_IMAGE", decisive=True),
    _path(
        "models_file",
        "paths",
        "Catalog of models that adds to AI-Flux's own",
        env="AIFLUX_MODELS_FILE",
    ),
    Setting(
        "co2_per_kwh",
        "accounting",
        parse.number(0, 5000),
        None,
        "Grams of CO2 for each kWh of the site's electricity",
        metavar="GRAMS",
        env="AIFLUX_CO2_PER_KWH",
    ),
    Setting(
        "billing_per_gpu_hour",
        "accounting",
        parse.number(0),
        None,
        "The site's billing units for an hour of a GPU",
        metavar="UNITS",
        env="AIFLUX_BILLING_PER_GPU_HOUR",
    ),
)
# Variables of AI-Flux that are not settings: they have no option and no YAML key.
VARIABLES = frozenset(
    {
        "AIFLUX_SITE_CONFIG",
        "AIFLUX_API_KEY",
        "AIFLUX_ENGINE_PROGRAM",
        "AIFLUX_EXIT_CODE",
        "AIFLUX_OLLAMA",
        "AIFLUX_CACHE_DIR",
        "AIFLUX_SEALED",
        "AIFLUX_UNSEALED",
        "AIFLUX_IMAGE_CPU_ONLY",
        "AIFLUX_IMAGE_GPU_VENDORS",
    }
)
BY_NAME: Mapping[str, Setting] = by_every_name(SETTINGS)
TITLES: Mapping[str, str] = {
    "run": "Requests",
    "slurm": "Slurm",
    "paths": "Files and directories",
    "accounting": "Accounting",
}
"""The sections, with their titles in help texts and pages."""
SECTIONS = tuple(TITLES)


@cache
def section_settings(section: str) -> Mapping[str, Setting]:
    """Return the settings of a section by every name that they have."""
    return {name: item for name, item in BY_NAME.items() if item.section == section}


def elsewhere(name: str, otherwise: str) -> str:
    """Return the remedy for a setting in the wrong section of a YAML file, or another one."""
    if name not in BY_NAME:
        return otherwise
    section = BY_NAME[name].section
    return f"{name} belongs to the section {section}: write it below '{section}:', indented"


def given_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the parameters of a command line; an empty list is not given."""
    return {name: value for name, value in params.items() if name in BY_NAME and value != ()}
