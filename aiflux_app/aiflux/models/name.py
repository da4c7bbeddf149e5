"""Model names as Ollama reads them: ``[http://][host/][namespace/]model[:tag]``.

Source: ollama, ``types/model/name.go`` (defaults: host registry.ollama.ai, namespace library, tag
latest; parts of 80 characters at most). An ``http://`` in front asks for a registry without TLS,
``@sha256:...`` at the end insists on the model's digest (both are AI-Flux's own).
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
MIN_DIGEST = 12  # hexadecimal digits, as many as `ollama list` shows
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}\Z")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(:[0-9]+)?\Z")
_LONGEST = 240  # characters of a name that becomes the name of one folder
_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{MIN_DIGEST},64}}\Z")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model's full name.

    Attributes:
        insecure: the registry is spoken to over plain http.
        digest: hexadecimal digits that the model's digest has to begin with; "" insists on none.
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
        """The name as a user writes it to have the model pulled."""
        return ("http://" if self.insecure else "") + self.served

    @property
    def pulled(self) -> str:
        """The name to give to ``/api/pull``."""
        scheme = "http://" if self.insecure else ""
        return scheme + f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def manifest_path(self) -> str:
        """Where the manifest lies below the models directory."""
        return f"manifests/{self.host}/{self.namespace}/{self.model}/{self.tag}"


@lru_cache(maxsize=1024)
def parse_model_name(text: str) -> ModelName:
    """Parse a model name.

    Raises:
        ConfigError: the text is no model name.
    """
    scheme, _, rest = text.rpartition("://")
    rest, insists, digest = rest.partition("@")
    if insists and not _DIGEST.match(digest.lower()):
        raise ConfigError(
            f"model {text!r} insists on {digest!r}, which is no digest",
            f"write NAME:TAG@sha256: and at least {MIN_DIGEST} hexadecimal digits (aiflux models "
            "show NAME:TAG tells them)",
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


def same_digest(one: ModelName, other: ModelName) -> bool:
    """Tell whether two names can insist on the same digest; one that insists on none can."""
    return one.digest.startswith(other.digest) or other.digest.startswith(one.digest)


def same_model(one: str, other: str) -> bool:
    """Tell whether two names mean the same model (``m`` and ``m:latest`` do)."""
    if one == other:
        return True
    try:
        return parse_model_name(one).served.lower() == parse_model_name(other).served.lower()
    except ConfigError:
        return False


def accepts_model(model: str, named: str) -> bool:
    """Tell whether a request that names ``named`` may go to the run's model.

    A digest that the request insists on must be one that the run's model insists on, too.
    """
    if not same_model(named, model):
        return False
    if "@" not in named:
        return True
    one, other = parse_model_name(model), parse_model_name(named)
    return one.digest != "" and same_digest(one, other)


def one_of_each(names: Iterable[str]) -> list[str]:
    """Return one name for each model: of several, the one that insists on the most of a digest.

    Raises:
        ConfigError: a name is wrong.
        InputError: two names of a model insist on different digests.
    """
    chosen: dict[str, str] = {}
    for name in names:
        model = parse_model_name(name)
        key = model.served.lower()
        other = chosen.setdefault(key, name)
        if not same_digest(model, parse_model_name(other)):
            raise InputError(
                f"requests insist on two digests of {model.served}: {other} and {name}",
                "leave one of them out, or run each by itself",
            )
        if len(model.digest) > len(parse_model_name(other).digest):
            chosen[key] = name
    return list(chosen.values())
