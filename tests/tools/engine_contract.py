"""What every engine kind promises: the same cases for each, on real processes and sockets.

A kind contributes an ``EngineSite``, which makes engines and disturbs their servers. Subclasses of
``EngineContract`` give it as the fixture ``site``.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.base import Engine, EngineKind, EngineSpec
from aiflux.engines.http import Answer, Client, ExchangeError
from aiflux.engines.ranks import Ranks
from aiflux.engines.sizing import in_flight
from aiflux.errors import EngineError, RejectedError


def engine_of(
    kind: EngineKind,
    plan: Plan,
    folder: Path,
    environ: Mapping[str, str],
    devices: tuple[str, ...] = (),
    index: int = 0,
    home: Path | None = None,
    ranks: Ranks | None = None,
) -> Engine:
    """Return an engine that is not started; its log, and its home by default, are in a folder."""
    spec = EngineSpec(
        index=index,
        plan=plan,
        model=plan.models[0],
        devices=devices,
        home=home or folder / f"home-{index}",
        log=folder / f"engine-{index}.log",
        environ=environ,
        say=lambda _: None,
        ranks=ranks,
    )
    return kind.make_engine(spec, lambda url, ca=None: Client(url, 120.0, 8, ca=ca))


class EngineSite(ABC):
    """A place where engines of a kind run.

    Attributes:
        model: one that its servers have, as the plan names it.
        digest: of that model; None where engines of the kind have none.
        slots: with which its servers are started; None where they report none.
        options: further options of the plan.
        url: the endpoint of the plan's only request.
        absent: a model that the servers do not have.
        rejects_others: its servers reject requests for a model that they do not have.
        patience: seconds that a start may take.
    """

    absent = "nobody:1b"
    rejects_others = False
    patience = 15.0
    kind: EngineKind
    model: str
    digest: str | None = None
    slots: int | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {}
        self.url = "/v1/chat/completions"
        self.environ = dict(os.environ)
        self.made: list[Engine] = []
        self.starts: list[Start] = []

    @property
    @abstractmethod
    def models_dir(self) -> Path: ...

    @abstractmethod
    def hold(self) -> None:
        """Keep the next servers from getting ready."""

    @abstractmethod
    def release(self) -> None:
        """Let them get ready."""

    @abstractmethod
    def crash(self, index: int = 0) -> None:
        """Let the server of an engine die, as ``kill -9`` does."""

    @abstractmethod
    def recover(self) -> None:
        """Do what somebody else has to do before the server can come back."""

    def make(self, model: str | None = None, index: int = 0) -> Engine:
        """Return an engine that is not started."""
        path = self.folder / "in.jsonl"
        hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        body = hello if self.url.endswith("/chat/completions") else {"input": "hello"}
        request = {"custom_id": "r", "method": "POST", "url": self.url, "body": body}
        path.write_text(json.dumps(request) + "\n", encoding="utf-8")
        options = RunOptions(
            model=model or self.model, engine_wait=120.0, slots=self.slots, **self.options
        )
        summary = scan_input(path, options.model)
        plan = make_plan(summary, self.folder / "o.json", options, self.models_dir, self.kind)
        engine = engine_of(self.kind, plan, self.folder, self.environ, index=index)
        self.made.append(engine)
        return engine

    def start(self, engine: Engine) -> Start:
        """Start an engine in a thread of its own."""
        start = Start(engine)
        self.starts.append(start)
        start.start()
        return start

    def running(self) -> Engine:
        """Return an engine that is ready; a site may return the same one to several cases."""
        engine = self.make()
        engine.start()
        return engine

    def servers(self) -> set[int]:
        """Return the servers with at least one process, by the ids of their sessions."""
        return set()

    def close(self) -> None:
        """Stop every engine that was made."""
        self.release()
        for engine in self.made:
            engine.close()
        for start in self.starts:
            start.leave()


class ProgramSite(EngineSite):
    """A site whose engines start a program; a wrapper holds it back and notes its id."""

    @property
    def models_dir(self) -> Path:
        return self.folder / "models"

    def wrap(self, command: list[str]) -> None:
        """Have engines start this command, with their own arguments."""
        self.program = self.folder / "engine-program"
        self.held = self.folder / "held"
        self.pids = self.folder / "pids"
        self.program.write_text(
            "#!/bin/sh\n"
            f"echo $$ >>{shlex.quote(str(self.pids))}\n"
            f"while [ -e {shlex.quote(str(self.held))} ]; do sleep 0.05; done\n"
            f'exec {shlex.join(command)} "$@"\n',
            encoding="utf-8",
        )
        self.program.chmod(0o755)
        self.environ["AIFLUX_ENGINE_PROGRAM"] = str(self.program)

    def hold(self) -> None:
        self.held.touch()

    def release(self) -> None:
        self.held.unlink(missing_ok=True)

    def started(self) -> list[int]:
        """Return the processes that were started, the oldest first."""
        if not self.pids.exists():
            return []
        return [int(line) for line in self.pids.read_text(encoding="utf-8").split()]

    def servers(self) -> set[int]:
        return {*self.started()} & sessions().keys()

    def crash(self, index: int = 0) -> None:
        living = self.servers()
        os.kill([pid for pid in self.started() if pid in living][-1], signal.SIGKILL)

    def recover(self) -> None:
        """Nothing: the worker starts another one."""


def sessions() -> dict[int, list[int]]:
    """Return the processes of every session, zombies left out."""
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        state, _, _, session = stat.rpartition(")")[2].split()[:4]
        if state != "Z":
            found.setdefault(int(session), []).append(int(name))
    return found


def command_of(pid: int) -> bytes:
    """Return a process's command line, its words separated by zeros; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def chat(engine: Engine, model: str) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return engine.client.post("/v1/chat/completions", json.dumps(body).encode())


def answers(engine: Engine, site: EngineSite) -> bool:
    answer = chat(engine, engine_name(site))
    return answer.status == 200 and "choices" in json.loads(answer.body)


def engine_name(site: EngineSite) -> str:
    return site.kind.served_name(site.model)


class Start(threading.Thread):
    """A start in a thread of its own, as the supervisor's.

    The thread lives on: the kernel ends a server together with the thread that started it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self.engine = engine
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._left = threading.Event()

    def run(self) -> None:
        try:
            self.engine.start()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self._over.set()
        self._left.wait()

    def lasts(self, seconds: float) -> bool:
        """Return whether the start takes longer than that."""
        return not self._over.wait(seconds)

    def ended(self, seconds: float) -> BaseException | None:
        """Wait until the start ends, and return its error."""
        assert self._over.wait(seconds), "the start did not end"
        return self.error

    def leave(self) -> None:
        """End the thread."""
        self._left.set()
        self.join()


class EngineContract:
    """The cases. Those that need a running engine may share one, so the last of them closes it."""

    def test_a_server_that_is_not_ready_is_waited_for(self, site: EngineSite) -> None:
        site.hold()
        engine = site.make()
        start = site.start(engine)
        assert start.lasts(0.4), "it did not wait"
        site.release()
        assert start.ended(site.patience) is None
        assert engine.is_ready()

    def test_a_started_engine_answers(self, site: EngineSite) -> None:
        engine = site.running()
        assert engine.is_alive()
        assert engine.is_ready()
        assert answers(engine, site)
        assert not site.rejects_others or chat(engine, "another").status == 404
        assert engine.facts.index == 0
        assert str(engine.index) in engine.describe() or "http" in engine.describe()

    def test_a_model_that_the_server_lacks_is_named(self, site: EngineSite) -> None:
        error: EngineError | None
        try:
            engine = site.make(site.absent)
            engine.start()
            error = engine.refusal(site.absent)
            assert engine.offers(site.absent) is False
            assert isinstance(error, RejectedError)
        except EngineError as failure:
            error = failure
        assert error is not None
        assert site.absent in error.message

    def test_the_digest_is_that_of_the_model(self, site: EngineSite) -> None:
        engine = site.running()
        assert engine.model_digest() == site.digest
        assert engine.ran(engine_name(site), engine_name(site)) == engine_name(site)
        assert engine.was_truncated(3) is False

    def test_its_slots_say_how_many_requests_to_send(self, site: EngineSite) -> None:
        engine = site.running()
        expected = None if site.slots is None else in_flight(site.slots)
        assert engine.max_in_flight() == expected
        assert engine.facts.slots == site.slots

    def test_it_gives_several_answers_as_its_kind_says(self, site: EngineSite) -> None:
        engine = site.running()
        wanted = (site.slots or 1) + 1  # llama-server refuses more than its slots
        body = {"model": engine_name(site), "n": wanted, "max_tokens": 2,
                "messages": [{"role": "user", "content": "hi"}]}  # fmt: skip
        answer = engine.client.post("/v1/chat/completions", json.dumps(body).encode())
        given = json.loads(answer.body).get("choices", ())
        if site.kind.generates_n is not None:
            assert site.kind.generates_n == (len(given) == wanted)

    def test_a_crash_is_noticed_and_a_start_brings_it_back(self, site: EngineSite) -> None:
        engine = site.running()
        before = engine.model_digest()
        site.crash()
        until(lambda: not engine.is_ready())
        assert not engine.is_alive()
        with pytest.raises(ExchangeError):
            answers(engine, site)
        site.recover()
        engine.start()
        assert engine.is_alive()
        assert answers(engine, site)
        assert engine.model_digest() == before

    def test_a_stop_in_mid_start_leaves_no_server_behind(self, site: EngineSite) -> None:
        others = site.servers()
        site.hold()
        engine = site.make()
        start = site.start(engine)
        if site.kind.managed:
            until(lambda: site.servers() > others)
        engine.stop()
        if not site.kind.managed:  # a server that AI-Flux did not start keeps running
            site.release()
            assert start.ended(site.patience) is None
            return
        assert isinstance(start.ended(site.patience), EngineError)
        assert not engine.is_ready()
        until(lambda: site.servers() == others)

    def test_close_from_another_thread_ends_a_start(self, site: EngineSite) -> None:
        others = site.servers()
        engine = site.make()
        site.hold()
        start = site.start(engine)
        assert start.lasts(0.2)
        engine.close()
        assert isinstance(start.ended(site.patience), EngineError)
        until(lambda: site.servers() == others)
        site.release()

    def test_no_engine_starts_after_its_end(self, site: EngineSite) -> None:
        others = site.servers()
        engine = site.make()
        engine.close()
        if site.kind.managed:
            with pytest.raises(EngineError):
                engine.start()
        until(lambda: site.servers() == others)

    def test_two_engines_are_apart(self, site: EngineSite) -> None:
        if not site.kind.managed:
            return  # there is one server
        one, two = site.running(), site.make(index=1)
        two.start()
        assert one.client.base_url != two.client.base_url
        one.stop()
        assert not one.is_ready()
        assert answers(two, site)

    def test_close_from_another_thread_ends_the_server(self, site: EngineSite) -> None:
        engine = site.running()
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(site.patience)
        assert not closing.is_alive()
        until(lambda: not site.servers())
