"""Prompts that are too long for the context of a server, found when it is up.

Planning finds them where the context is known before the run; it is not where a server decides it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from aiflux.core.batch.prompt_lengths import FoundPrompts, PromptLimit
from aiflux.core.batch.request import request_key
from aiflux.core.config.settings import CHUNK
from aiflux.core.runs.journal import JournalWriter
from aiflux.core.runs.open import find_in_run, refuse_long, too_long_result
from aiflux.core.runs.plan import Plan, Shard
from aiflux.engines.base import Engine
from aiflux.engines.kinds import engine_kind
from aiflux.engines.server_context import server_limit
from aiflux.errors import ConfigError
from aiflux.util.lines import read_lines
from aiflux.util.text import counted
from aiflux.worker.scheduler import Source
from aiflux.worker.stats import Stats

_NO_CONTEXT = "the server does not report its context"
_SMALL_CONTEXT = 4096
"""Tokens: that of an Ollama without settings."""


class LengthCheck:
    """Checks the requests of a shard once for each model. Thread-safe.

    Args:
        source: gets the requests that are left out or split.
        stats: counts those that are left out.
        say: prints what was found.
    """

    def __init__(
        self, plan: Plan, shard: Shard, source: Source, stats: Stats, say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._span = (shard.start, shard.end)
        self._source = source
        self._stats = stats
        self._say = say
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def check(self, model: str, engine: Engine, journal: JournalWriter) -> None:
        """Find the prompts that are too long, before the first request, if planning could not.

        Args:
            engine: one of the model that is up; another one waits until the check is done.
            journal: gets a result for each request that is left out.

        Raises:
            InputError: the run is to fail then, or they cannot be split.
            ConfigError: they are to be split, and the context is unknown.
        """
        if not self._plan.lengths_at_start:
            return
        with self._lock:
            if model not in self._checked:
                limit = server_limit(self._plan, model, engine.client)
                if limit is None:
                    self._unknown_context()
                else:
                    engine.facts.context_length = limit.context
                    self._find(model, limit, journal)
                self._checked.add(model)

    def _unknown_context(self) -> None:
        """Say that lengths are not checked."""
        how = "say what it is with --context-length N"
        if self._plan.options.too_long == CHUNK:
            raise ConfigError(f"{_NO_CONTEXT}, so prompts cannot be split (--too-long chunk)", how)
        if self._plan.input.longest_tokens > _SMALL_CONTEXT:
            self._say(f"{_NO_CONTEXT}, so prompts that are too long are not found before they are "
                      f"sent; {how}")  # fmt: skip

    def _find(self, model: str, limit: PromptLimit, journal: JournalWriter) -> None:
        plan, source, say = self._plan, self._source, self._say
        kind = engine_kind(plan.options)
        found = find_in_run(plan.input, plan, kind, {model: limit}, self._span)
        if found is None or not found.facts.too_long:
            self._send(model, ())
            return
        refuse_long(found, plan)
        facts = found.facts
        if not facts.counted:
            planned = plan.long_prompts
            if planned is not None and planned.context == facts.context:
                return  # planning warned of them
            say(f"warning: about {counted(facts.too_long, 'prompt')} may be too long for the "
                f"context of {facts.context:,} tokens ({facts.where}): this is an estimate, "
                f"because {facts.uncounted}")  # fmt: skip
            return
        many = counted(facts.too_long, "request")
        context = f"the context of {facts.context:,} tokens"
        if found.splits:
            source.splits = {**source.splits, **dict(zip(found.offsets, found.splits, strict=True))}
            say(f"{many} too long for {context}: sent in {facts.parts:,} parts (--too-long chunk)")
            return
        say(f"{many} too long for {context}: not sent (--too-long skip; {facts.where})")
        self._send(model, found.offsets)
        self._leave_out(found, journal)

    def _leave_out(self, found: FoundPrompts, journal: JournalWriter) -> None:
        plan, source = self._plan, self._source
        source.left_out = {*source.left_out, *found.offsets}
        for offset, tokens in zip(found.offsets, found.tokens, strict=True):
            _, _, raw = next(read_lines(plan.input_path, offset, offset + 1))
            key = request_key(raw)
            if not source.is_done(key):
                result = too_long_result(plan, raw, key, tokens, found.facts.context)
                journal.append(result)
                self._stats.not_sent()

    def _send(self, model: str, too_long: Collection[int]) -> None:
        """Send the requests that an earlier start left out, unless they are still too long."""
        known = frozenset(too_long)
        fitting = [
            key for offset, key in self._source.left_out_before(model) if offset not in known
        ]
        for key in fitting:
            self._source.fitting.add(key)
            self._stats.to_send()
