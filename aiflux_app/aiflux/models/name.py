"""Model names: Ollama's ``[http://][host/][namespace/]model[:tag]``, and Hugging Face's.

Source of the former: ollama, ``types/model/name.go`` (defaults: host registry.ollama.ai, namespace
library, tag latest; parts of at most 80 characters). AI-Flux adds an ``http://`` prefix for a
registry without TLS, and ``@sha256:...`` at the end, which requires this digest.

Models of Hugging Face are ``hf:ORG/NAME[@REVISION]``. Source of their grammar: huggingface_hub,
``utils/_validators.py`` (validate_repo_id).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from aiflux.errors import ConfigError, InputError

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MIN_DIGEST = 12  # hexadecimal digits, as in `ollama list`
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}\Z")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(:[0-9]+)?\Z")
_LONGEST = 240  # maximum length, because a name becomes a directory name
_COMMIT_DIGITS = 40
HUB_PREFIX = "hf:"
GGUF_SUFFIX = ".gguf"
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_REPO = re.compile(f"{_HUB_PART}/{_HUB_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{MIN_DIGEST},64}}\Z")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model's full name.

    Attributes:
        insecure: use plain http for the registry.
        digest: required start of the model's digest in hexadecimal; "" requires none.
    """

    host: str
    namespace: str
    model: str
    tag: str
    insecure: bool = False
    digest: str = ""

    @property
    def served(self) -> str:
        """The name under which an engine lists and serves the model."""
        short = f"{self.model}:{self.tag}"
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/{short}"

    @property
    def written(self) -> str:
        """The name as a user types it to pull the model."""
        return ("http://" if self.insecure else "") + self.served

    @property
    def pulled(self) -> str:
        """The name for ``/api/pull``."""
        scheme = "http://" if self.insecure else ""
        return scheme + f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def manifest_path(self) -> str:
        """Path of the manifest below the models directory."""
        return f"manifests/{self.host}/{self.namespace}/{self.model}/{self.tag}"


@lru_cache(maxsize=1024)
def parse_model_name(text: str) -> ModelName:
    """Parse a model name.

    Raises:
        ConfigError: the text is not a model name.
    """
    scheme, _, rest = text.rpartition("://")
    rest, insists, digest = rest.partition("@")
    if insists and not _DIGEST.match(digest.lower()):
        raise ConfigError(
            f"model {text!r} has the invalid digest {digest!r}",
            f"write NAME:TAG@sha256: and at least {MIN_DIGEST} hexadecimal digits (see aiflux "
            "models show NAME:TAG)",
        )
    parts = rest.split("/")
    model, _, tag = parts[-1].partition(":")
    namespace = parts[-2] if len(parts) > 1 else DEFAULT_NAMESPACE
    host = parts[-3] if len(parts) > 2 else DEFAULT_HOST
    tag = tag if ":" in parts[-1] else DEFAULT_TAG
    valid = (
        scheme in ("", "http", "https")
        and len(parts) <= 3
        and len(rest) <= _LONGEST
        and _HOST.match(host)
        and all(_PART.match(part) for part in (namespace, model, tag))
    )
    if not valid:
        raise ConfigError(
            f"model {text!r} is not a model name",
            "write it as Ollama does: NAME:TAG, for example llama3.2:3b",
        )
    return ModelName(
        host,
        namespace,
        model,
        tag,
        insecure=scheme == "http",
        digest=digest.lower().removeprefix("sha256:"),
    )


def is_path(text: str) -> bool:
    """Return whether a name is the path of a model's file or directory: no name begins so."""
    return text in (".", "..") or text.startswith(("/", "./", "../", "~"))


def refuse_gguf_file(name: str, engine: str, otherwise: str = "") -> None:
    """Refuse the path of a GGUF file; a tag may end like one.

    Args:
        engine: title of the one that cannot run it.
        otherwise: another way to use the file with it.

    Raises:
        ConfigError: it is such a path.
    """
    if name.lower().endswith(GGUF_SUFFIX) and ":" not in name:
        raise ConfigError(
            f"{name} is a GGUF file, which {engine} does not run",
            "; or ".join(filter(None, ["use --engine llamacpp", otherwise])),
        )


def is_hub_name(text: str) -> bool:
    """Return whether a name has the prefix of Hugging Face's models, also in capitals."""
    return text[: len(HUB_PREFIX)].lower() == HUB_PREFIX


def split_hub_name(text: str) -> tuple[str, str | None] | None:
    """Return ``ORG/NAME`` and the revision of a name, with or without prefix.

    The revision is None if the name has none. Returns None if the text is not such a name.
    """
    repo, at, revision = text[len(HUB_PREFIX) * is_hub_name(text) :].partition("@")
    if not _HUB_REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        return None
    valid = _REVISION.fullmatch(revision) and ".." not in revision and revision[0] != "/"
    return None if at and not valid else (repo, revision or None)


def shown_digest(digest: str) -> str:
    """Return a model's digest with its kind: SHA-256, or a commit of Hugging Face."""
    if ":" in digest:
        return digest
    return f"commit {digest}" if len(digest) == _COMMIT_DIGITS else f"sha256:{digest}"


def same_digest(one: ModelName, other: ModelName) -> bool:
    """Return whether two names can have the same digest; a name without one matches all."""
    return one.digest.startswith(other.digest) or other.digest.startswith(one.digest)


def same_model(one: str, other: str) -> bool:
    """Return whether two names are the same model (``m`` and ``m:latest`` are)."""
    if one == other:
        return True
    try:
        return parse_model_name(one).served.lower() == parse_model_name(other).served.lower()
    except ConfigError:
        return False


def accepts_model(model: str, named: str) -> bool:
    """Return whether a request that names ``named`` can go to the run's model.

    A digest required by the request must match the one required by the run's model.
    """
    if not same_model(named, model):
        return False
    if "@" not in named:
        return True
    one, other = parse_model_name(model), parse_model_name(named)
    return one.digest != "" and same_digest(one, other)


def one_of_each(names: Iterable[str]) -> list[str]:
    """Return one name per model; if there are several, the one with the longest digest.

    Raises:
        ConfigError: a name is invalid.
        InputError: two names of a model require different digests.
    """
    chosen: dict[str, str] = {}
    for name in names:
        model = parse_model_name(name)
        key = model.served.lower()
        other = chosen.setdefault(key, name)
        if not same_digest(model, parse_model_name(other)):
            raise InputError(
                f"requests require two digests of {model.served}: {other} and {name}",
                "remove one of them, or run each separately",
            )
        if len(model.digest) > len(parse_model_name(other).digest):
            chosen[key] = name
    return list(chosen.values())
