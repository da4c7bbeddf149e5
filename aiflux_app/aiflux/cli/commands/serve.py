"""``aiflux serve`` and ``aiflux connect``: an engine as a Slurm job, and the way to it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from shlex import join, quote
from typing import Any

import click
from click.core import ParameterSource

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    Choice,
    Number,
    WholeNumber,
    argument,
    command,
    option,
    settings_options,
)
from aiflux.cli.start import show_local_choices
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.serve_directory import ENDED, READY, ServeDirectory, served_directories
from aiflux.engines.http import Client, ExchangeError
from aiflux.engines.process import PROXIES, free_port
from aiflux.errors import EngineError, ExitCode, SlurmError, UsageError
from aiflux.slurm.preflight.local import finding_text
from aiflux.slurm.serve import (
    ServeView,
    default_name,
    plan_serve,
    serve_options,
    stop,
    submit_serve,
    view_of,
    views_of,
)
from aiflux.slurm.tunnel import Tunnel
from aiflux.util.times import pause_after

_POLL = 1.0
_REACH_TIMEOUT = 5.0
_REACH_TRIES = 3
# Settings of requests, and of runs with several jobs.
_WITHOUT = {
    "concurrency", "tune", "nodes_per_engine", "engine_command", "save_frequency", "max_retries",
    "retry_delay", "validate", "revalidate_attempts", "max_failures", "max_requeues",
    "drain_seconds", "max_tokens", "samples", "temperature", "top_p", "top_k", "stop",
    "engine_url", "engine_wait", "engine_ca", "request_timeout", "retry_failed", "model_config",
    "shards", "max_running", "too_long",
}  # fmt: skip
# What `serve_options` does if they are not given.
_HELPS = {
    "engine": "Engine to start: llamacpp, vllm (default: by the model)",
    "gpus_per_engine": "GPUs for each engine (default: all GPUs of the job)",
}


@command(
    "serve",
    examples=[
        "aiflux serve --model llama3.2:3b --time 02:00:00",
        "aiflux serve list",
        "aiflux serve stop llama3.2-3b",
    ],
)
@argument(
    "action",
    required=False,
    metavar="[ACTION]",
    type=Choice(("list", "stop")),
    help="List your engines (list), or stop or forget one (stop)",
)
@argument("name", required=False, metavar="[NAME]", help="Engine to stop")
@option("--name", "as_name", metavar="NAME", help="Name of the engine (default: from the model)")
@option(
    "--idle-minutes",
    type=Number(),
    default=30.0,
    metavar="N",
    help="End the engine after N minutes without requests (default: 30)",
)
@option("--tunnel", is_flag=True, help="Listen on the node's loopback only, for ssh tunnels")
@option("--detach", is_flag=True, help="Do not wait until the engine is ready")
@option("--no-preflight", is_flag=True, rare=True, help="Skip the checks of Slurm and image")
@json_option("Print the list, or the new engine, as JSON")
@settings_options("run", "slurm", "paths", without=_WITHOUT, helps=_HELPS)
def serve(action: str | None, name: str | None, as_json: bool, **more: Any) -> int:
    """Start an engine as a Slurm job, to develop prompts against it.

    It has its own key and certificate, and ends when it is idle or its time is over.
    """
    if action is None and as_json:
        with redirect_stdout(sys.stderr):
            code, directory = _serve(more)
        print_json(_to_json(view_of(directory)))
        return code
    if action is None:
        return _serve(more)[0]
    ctx = click.get_current_context()
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
        if given and param.name not in ("action", "as_json" if action == "list" else "name"):
            raise UsageError(
                f"aiflux serve {action} has no {param.opts[0]}", "aiflux serve --help shows both"
            )
    if action == "list":
        return _list(as_json=as_json)
    if name is None:
        raise UsageError("aiflux serve stop needs a name", "aiflux serve list shows the names")
    return _stop(ServeDirectory.existing(name, os.environ))


def _serve(more: dict[str, Any]) -> tuple[int, ServeDirectory]:
    """Serve an engine; return the exit code and its directory."""
    minutes = more["idle_minutes"]
    if not minutes > 0:
        raise UsageError(f"--idle-minutes {minutes:g} is too short", "give more than 0")
    config = Config(arguments=given_settings(more))
    slurm = config.get_slurm_config()
    options = serve_options(config, slurm)
    directory = ServeDirectory.named(
        more["as_name"] or default_name(options.model or ""), os.environ
    )
    planned = plan_serve(
        config,
        slurm,
        directory,
        options,
        idle_seconds=minutes * 60,
        tunnel=more["tunnel"],
        check=not more["no_preflight"],
    )
    show_local_choices(config, planned.image)
    for finding in planned.findings:
        print(f"warning: {finding_text(finding)}", file=sys.stderr)
    job = submit_serve(directory, planned)
    name = directory.name
    print(f"submitted job {job}: {options.model} is served as {name}")
    if more["detach"]:
        print(f"  use it: aiflux connect {name}    stop it: aiflux serve stop {name}")
        return 0, directory
    try:
        view = _ready(directory)
    except KeyboardInterrupt:
        print(
            f"the job continues; use it: aiflux connect {name}; stop it: aiflux serve stop {name}",
            file=sys.stderr,
        )
        return int(ExitCode.STOPPED), directory
    print(f"ready: {view.started.engine}")
    print(f"  it ends after {minutes:g} minutes without requests, or: aiflux serve stop {name}")
    if more["tunnel"]:
        print(f"  it listens on its node's loopback only: open a tunnel with aiflux connect {name}")
        return 0, directory
    url = _reached(view)
    print("  not sealed: a key and TLS protect it from others who reach the node")
    _print_environment(view, url)
    return 0, directory


@command("connect", examples=["aiflux connect llama3.2-3b"])
@argument("name", metavar="NAME", help="Engine, as in aiflux serve list")
@option(
    "--port",
    type=WholeNumber(1, 65535),
    metavar="N",
    help="Local port of the tunnel (default: any)",
)
def connect(name: str, port: int | None) -> int:
    """Open an ssh tunnel to an engine of aiflux serve, until Ctrl-C.

    It follows the engine to another node. If the site does not allow ssh to nodes, the address of
    the node is shown.
    """
    directory = ServeDirectory.existing(name, os.environ)
    try:
        return _connect(directory, port or free_port())
    except KeyboardInterrupt:
        return 0


def _connect(directory: ServeDirectory, local: int) -> int:
    view, url = _ready(directory), f"https://127.0.0.1:{local}"
    try:
        tunnel = _opened(view, local)
    except SlurmError as error:
        return _without_tunnel(view, error)
    print(f"tunnel to {view.name}; Ctrl-C closes it")
    _print_environment(view, url)
    sys.stdout.flush()
    while True:
        with tunnel:
            while tunnel.open and directory.read_state() == view.state:
                time.sleep(_POLL)
        print(f"the tunnel to {view.name} broke; looking for it again", file=sys.stderr)
        view = _wait(directory)
        if view.phase == ENDED:
            print(f"{view.name} has ended ({view.why})")
            return 0
        tunnel = _opened_again(view, local)
        print(f"tunnel to {view.name} is open again", file=sys.stderr)


def _opened(view: ServeView, local: int) -> Tunnel:
    """Return a tunnel to an engine.

    Raises:
        SlurmError: ssh is missing or failed.
        EngineError: another program answers.
    """
    state = view.started
    tunnel = Tunnel(state.node, state.host, state.port, local, os.environ)
    try:
        _refuse_stranger(view, f"https://127.0.0.1:{local}")
    except BaseException:
        tunnel.close()
        raise
    return tunnel


def _opened_again(view: ServeView, local: int) -> Tunnel:
    """Return a tunnel to an engine that may be at another place again before it is open."""
    directory, last = view.directory, ""
    while True:
        try:
            return _opened(view, local)
        except (SlurmError, EngineError) as error:
            if error.message != last:
                print(f"{error.message}; trying again", file=sys.stderr)
            last = error.message
        time.sleep(_POLL)
        view = _ready(directory)


def _without_tunnel(view: ServeView, error: SlurmError) -> int:
    """Print the address of the node, if the engine listens there."""
    if view.directory.read_settings().addresses is None:
        raise SlurmError(
            f"{error.message}; and the engine listens on the loopback of its node only",
            f"start it again by `aiflux serve` without --tunnel; or {error.remedy}",
        ) from error
    print(f"{error.message}; using the address of the node", file=sys.stderr)
    url = _reached(view)
    _print_environment(view, url)
    return 0


def _ready(directory: ServeDirectory) -> ServeView:
    """Return an engine once it is ready.

    Raises:
        EngineError: it has ended; shows the end of its log.
    """
    view = _wait(directory)
    if view.phase == READY:
        return view
    log = f"\n{view.log_end}" if view.log_end else ""
    raise EngineError(
        f"the engine {view.name} has ended ({view.why}){log}",
        f"see its log: {view.log}; then serve it again" if view.log else "serve it again",
    )


def _wait(directory: ServeDirectory) -> ServeView:
    """Return an engine once it is ready or has ended."""
    began = time.monotonic()
    with _progress() as show:
        while (view := view_of(directory)).phase not in (READY, ENDED):
            why = f" ({view.why})" if view.why else ""
            waited = time.monotonic() - began
            show(f"job {view.job}: {view.phase}{why}", waited)
            time.sleep(pause_after(waited))
    return view


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Yield what shows a line: on a terminal again and again, else when it changes."""
    live = sys.stderr.isatty()
    last = ""

    def show(text: str, seconds: float) -> None:
        nonlocal last
        if live:
            print(f"\r\x1b[2K{text}, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
        elif text != last:
            print(text, file=sys.stderr, flush=True)
        last = text

    try:
        yield show
    finally:
        if live and last:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _reached(view: ServeView) -> str:
    """Return the address of an engine; check that this machine reaches it.

    Raises:
        EngineError: it does not, or something else answers.
    """
    url = view.started.url
    _refuse_stranger(view, url)
    return url


def _refuse_stranger(view: ServeView, url: str) -> None:
    """Refuse an address at which the engine's own certificate is not shown.

    Raises:
        EngineError: nothing answers, or something else.
    """
    files = view.directory
    client = Client(url, _REACH_TIMEOUT, 1, files.read_key(), str(files.certificate))
    try:
        for left in reversed(range(_REACH_TRIES)):
            try:
                client.get("/health", _REACH_TIMEOUT)
                return
            except ExchangeError as error:
                if error.remedy:
                    raise EngineError(
                        f"{url} is not the engine {view.name}: {error.message}",
                        "another program answers there, or intercepts the connection; wait a "
                        "minute if the job was requeued, else serve the engine again",
                    ) from error
                if not left:
                    raise EngineError(
                        f"the engine {view.name} is ready, but this machine does not reach it: "
                        f"{error.message}",
                        f"open a tunnel: aiflux connect {view.name}; or use a machine in the "
                        "cluster's network",
                    ) from error
                time.sleep(_POLL)
    finally:
        client.close()


def _print_environment(view: ServeView, url: str) -> None:
    """Print how to use an engine; its key is in files only."""
    files = view.directory
    model = view.started.model
    proxies = sorted(name for name in PROXIES if os.environ.get(name))
    host = url.removeprefix("https://").rpartition(":")[0]
    print()
    print(f"export OPENAI_BASE_URL={url}/v1")
    print(f'export OPENAI_API_KEY="$(cat {quote(str(files.key))})"')
    print(f"export SSL_CERT_FILE={quote(str(files.certificate))}")
    if proxies:
        print(f"export NO_PROXY={host} no_proxy={host}")
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    print()
    words = ["curl", "--noproxy", "*", "--cacert", str(files.certificate)]
    words += ["-H", f"@{files.header}", "-H", "Content-Type: application/json"]
    words += ["-d", json.dumps(body), f"{url}/v1/chat/completions"]
    print(join(words))


def _list(*, as_json: bool) -> int:
    views = [*views_of(served_directories(os.environ))]
    if as_json:
        print_json([_to_json(view) for view in views])
        return 0
    if not views:
        print("no engines; start one: aiflux serve --model NAME")
        return 0
    rows = [("NAME", "STATE", "JOB", "MODEL", "NODE", "WHY"), *map(_row, views)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _row(view: ServeView) -> tuple[str, ...]:
    state = view.started
    why = view.why.splitlines()[0] if view.why else ""
    return view.name, view.phase, str(view.job or ""), state.model, state.node, why


def _to_json(view: ServeView) -> dict[str, Any]:
    state = view.started
    return {
        "name": view.name,
        "state": view.phase,
        "why": view.why,
        "job": str(view.job) if view.job else None,
        "model": state.model or None,
        "node": state.node or None,
        "url": state.url if view.phase == READY else None,
        "key": view.directory.key,
        "certificate": view.directory.certificate,
        "sealed": False,
        "directory": view.directory.path,
        "log": view.log,
    }


def _stop(directory: ServeDirectory) -> int:
    view = view_of(directory)
    if stop(view):
        print(f"stopped {view.name}: job {view.job} was cancelled")
    else:
        print(f"{view.name} had ended already ({view.why}); its files were removed")
    return int(ExitCode.OK)
