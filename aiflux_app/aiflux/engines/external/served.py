"""The engine of `aiflux serve`, at ``--engine-url serve:NAME``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from aiflux.core.batch.prompt_lengths import AT_ONCE, PromptLimit
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.serve_directory import ENDED, READY, SIGNAL, ServeDirectory, ServeState
from aiflux.engines.base import EngineKind, HttpFactory
from aiflux.engines.external.engine import ExternalEngine
from aiflux.engines.http import Client, ExchangeError, ca_bundle
from aiflux.engines.kinds import engine_kind
from aiflux.engines.ollama.store import model_files, stored_tokenizer
from aiflux.engines.served_models import MODELS_PATH, ServedModels
from aiflux.engines.server_context import server_limit
from aiflux.errors import ConfigError, ModelError, RejectedError
from aiflux.models.name import parse_model_name
from aiflux.models.tokenizer import ModelTokenizer

_log = logging.getLogger(__name__)
_ASK_SECONDS = 5.0
_COUNT_SECONDS = 60.0  # a busy server answers late


class ServedEngine(ExternalEngine):
    """An engine that is found by the files of its directory, again after each requeue.

    Its own key is used, and only its certificate is trusted.
    """

    def __init__(
        self,
        kind: EngineKind,
        directory: ServeDirectory,
        make_client: HttpFactory,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._certificate = str(directory.certificate)
        self._key = directory.read_key()
        self._make_client = make_client
        super().__init__(kind, f"serve:{directory.name}", self._client_of, patience, say)

    def _client_of(self, url: str) -> Client:
        return self._make_client(url, self._certificate, self._key)

    def _probe(self) -> str | None:
        """Find the engine; return why it is not ready, or None.

        Raises:
            RejectedError: it has ended, or another program answers at its address.
        """
        state = self._directory.read_state()
        if state is None or state.phase != READY:
            return self._absence(state)
        if self.client.base_url != state.url:
            self.client.close()
            self.client = self._client_of(state.url)
        return super()._probe()

    def _absence(self, state: ServeState | None) -> str:
        """Return what the engine waits for."""
        name = self._directory.name
        if state is None or state.phase != ENDED:
            return f"the engine {name} is not ready yet"
        _refuse_ended(self._directory, state)
        return f"the engine {name} was stopped, and is back if its job was requeued"

    def _rejected(self, error: ExchangeError) -> RejectedError:
        name = self._directory.name
        return RejectedError(
            f"the engine {name}: {error.message}",
            f"only its own certificate is trusted, {self._certificate}: another program answers at "
            "its address, or intercepts the connection; see aiflux serve list",
        )


def models_at(url: str, ca: str | None) -> ServedModels:
    """Return the models of a running server; none while an engine of `aiflux serve` starts.

    Args:
        ca: trusted certificates.

    Raises:
        UsageError: no engine is served under the name.
        EngineError: the engine has ended, or the server does not answer.
    """
    served = ServeDirectory.of_url(url, os.environ)
    if served is None:
        key = os.environ.get("AIFLUX_API_KEY")
        return ServedModels.at(url, ca_bundle(ca, os.environ), key)
    state = served.read_state()
    if state is None or state.phase != READY:
        _refuse_ended(served, state)
        return ServedModels(url, _log.info)  # it has no address
    return ServedModels.at(state.url, str(served.certificate), served.read_key())


def running_limit(plan: Plan, model: str) -> PromptLimit | None:
    """Return the context and the tokenizer of a running server; None if it does not answer.

    Args:
        plan, model: of the run that uses the server; its models directory may have the model, too.
    """
    options, key = plan.options, os.environ.get("AIFLUX_API_KEY")
    url, trusted = options.engine_url or "", ca_bundle(options.engine_ca, os.environ)

    def connect() -> Client:
        return Client(url, _COUNT_SECONDS, connections=AT_ONCE, api_key=key, ca=trusted)

    with closing(connect()) as client:
        try:
            client.get(MODELS_PATH, _ASK_SECONDS)
        except ExchangeError:
            return None
        limit = server_limit(plan, model, client, connect)
    if limit is None or plan.models_dir is None:
        return limit
    open_tokenizer = partial(_either_tokenizer, limit.open_tokenizer, plan.models_dir, model)
    return replace(limit, open_tokenizer=open_tokenizer)


def _either_tokenizer(
    of_server: Callable[[], ModelTokenizer], models_dir: Path, model: str
) -> ModelTokenizer:
    """Return the tokenizer of a server, or of the same model if it is stored here, too.

    Raises:
        ModelError: the server has none, and its model is not stored.
        ConfigError: the library is not installed.
    """
    try:
        return of_server()
    except ModelError as error:
        try:
            name = parse_model_name(model)
            model_files(models_dir, name)
        except (ConfigError, ModelError):
            raise error from None
        return stored_tokenizer(models_dir, name, templated=False)


def served_limit(directory: ServeDirectory, plan: Plan, model: str) -> PromptLimit | None:
    """Return the context and the tokenizer of an engine of `aiflux serve`, from its own plan.

    Args:
        plan, model: of the run that uses the engine.

    Raises:
        RunConflictError: the engine's plan cannot be read.
    """
    own, options = read_plan(directory.run), plan.options
    limit = engine_kind(own.options).prompt_limit(own, own.models[0])
    if limit is None:
        return None
    context = min(limit.context, options.context_length or limit.context)
    answer = options.parameters_of(plan.served(model)).get("max_tokens") or 0
    return replace(limit, context=context, maximum=context, answer=answer)


def _refuse_ended(directory: ServeDirectory, state: ServeState | None) -> None:
    """Refuse an engine that does not come back by itself.

    Raises:
        RejectedError: it has ended, and not by a signal.
    """
    if state is not None and state.phase == ENDED and state.reason != SIGNAL:
        raise RejectedError(
            f"the engine {directory.name} has ended ({state.end})",
            f"start it again: aiflux serve --name {directory.name} ...",
        )
