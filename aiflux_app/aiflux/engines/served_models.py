"""The models that a server lists, and the one that gave an answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from fnmatch import fnmatchcase

from aiflux.engines.http import Answer, Client, ExchangeError
from aiflux.errors import EngineError, RejectedError
from aiflux.util.text import joined, public_url, suggestion

_log = logging.getLogger(__name__)
MODELS_PATH = "/v1/models"
_NAMED = 5  # models in a message
_ASK_SECONDS = 10.0


class ServedModels:
    """The models of a server that has its own. Thread-safe.

    Args:
        server: the server, in messages.
        say: called with a warning.
    """

    def __init__(self, server: str, say: Callable[[str], None]) -> None:
        self._server = server
        self._say = say
        self.names: tuple[str, ...] = ()
        self._offered: dict[str, bool] = {}
        self._said: set[tuple[str, str]] = set()

    @classmethod
    def at(cls, url: str, ca: str | None, api_key: str | None) -> ServedModels:
        """Return the models of a running server.

        Raises:
            EngineError: it does not answer.
        """
        server = f"the engine at {public_url(url)}"
        client = Client(url, _ASK_SECONDS, connections=1, api_key=api_key, ca=ca)
        try:
            found = cls(server, _log.info)
            found.note(client.get(MODELS_PATH, _ASK_SECONDS))
        except ExchangeError as error:
            raise EngineError(
                f"{server} does not answer: {error.message}",
                "check the address, and that the server is running",
            ) from error
        finally:
            client.close()
        return found

    def note(self, answer: Answer) -> None:
        """Take the models from an answer of ``MODELS_PATH``."""
        self.names = _names(answer)
        self._offered = {}

    def refusal(self, model: str) -> RejectedError | None:
        """Return the error for a model that the server does not list; None if it may have it."""
        return None if self.offers(model) is not False else self._absent(model)

    def offers(self, model: str) -> bool | None:
        """Return whether the server lists a model; None if it lists no models."""
        if not self.names:
            return None
        offered, names = self._offered, self.names
        if model not in offered:
            offered[model] = any(fnmatchcase(_plain(model), _plain(name)) for name in names)
        return offered[model]

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the name of the model that gave an answer.

        Raises:
            RejectedError: the engine lists its models without the requested one, and another one
                answered.
        """
        if answered in (None, asked) or _plain(answered) == _plain(asked):
            self._warn_of_unlisted(asked)
            return asked
        if self.offers(asked) is False and not _is_version(asked, answered):
            error = self._absent(asked)
            raise RejectedError(
                f"{self._server} answers as {answered!r}, but {asked!r} was requested",
                error.remedy,
            )
        if (asked, answered) not in self._said:
            self._said.add((asked, answered))
            self._say(f"the engine answers as {answered!r} although {asked!r} was requested; the "
                      "results name both")  # fmt: skip
        return answered

    def _warn_of_unlisted(self, model: str) -> None:
        """Say once that a model is not listed: the server may answer with any, as proxies do."""
        if self.offers(model) is False and (model, model) not in self._said:
            self._said.add((model, model))
            more = ["..."] if len(self.names) > _NAMED else []
            listed = joined([*self.names[:_NAMED], *more])
            self._say(f"warning: {self._server} does not list the model {model!r}, but "
                      f"answers in its name; it lists {listed}")  # fmt: skip

    def _absent(self, model: str) -> RejectedError:
        return RejectedError(
            f"{self._server} does not offer the model {model!r}",
            f"{suggestion(model, self.names)} (--model NAME, or the requests' body.model)",
        )


def _names(answer: Answer) -> tuple[str, ...]:
    """Return ids, aliases and paths of the listed models; empty without a list."""
    if answer.status != 200:
        return ()
    try:
        listed = json.loads(answer.body)["data"]
        entries = [entry for entry in listed if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    names: dict[str, None] = {}
    for entry in entries:
        aliases = entry.get("aliases")
        for name in (entry.get("id"), *(aliases if isinstance(aliases, list) else ())):
            if isinstance(name, str) and name:
                names[name] = None
    return tuple(names)


def _plain(name: str) -> str:
    """Return a model's name for comparison: some servers ignore case and add ``:latest``."""
    return name.casefold().removesuffix(":latest")


def _is_version(asked: str, answered: str) -> bool:
    """Return whether the names only differ by a date or version at the end, or a directory."""
    one, other = _plain(asked), _plain(answered)
    rest = other.removeprefix(one)
    dated = rest != other and rest[:1] in ("-", "@", ":") and rest[1:2].isdigit()
    return dated or one.endswith("/" + other) or other.endswith("/" + one)
