"""`aiflux gateway`: OpenAI's Files and Batches API over runs."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.cli.parser import FILE, FOLDER, WholeNumber, command, option, settings_options
from aiflux.cli.start import refuse_local_at_url, show_local_choices, show_unused_settings
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.registry import state_folder
from aiflux.engines.kinds import kind_named
from aiflux.errors import UsageError
from aiflux.slurm.preflight.local import finding_text
from aiflux.util.extras import need

if TYPE_CHECKING:
    import socket

# Each local batch starts an engine, which takes the whole GPU. A server has its own limits.
_AT_ONCE_LOCAL, _AT_ONCE_AT_SERVER = 1, 8
_LIBRARIES = ("starlette.applications", "uvicorn", "python_multipart")


@command(
    "gateway",
    examples=[
        "aiflux gateway --model llama3.2:3b --time 08:00:00",
        "aiflux gateway --engine-url http://127.0.0.1:8000",
    ],
    exclusive=[("port", "socket"), ("local", "engine_url")],
    note="Stop it with Ctrl-C at any time: batches continue, and the next start knows them.",
)
@option(
    "--port", metavar="N", type=WholeNumber(most=65535), help="Port of 127.0.0.1 (default: 8327)"
)
@option("--socket", metavar="PATH", type=FILE, help="Unix socket to listen on instead")
@option(
    "--dir",
    "folder",
    metavar="DIR",
    type=FOLDER,
    help="Files, batches and key (default: ~/.local/state/aiflux/gateway)",
)
@option("--local", is_flag=True, help="Process batches on this machine instead of in Slurm")
@option(
    "--at-once",
    metavar="N",
    type=WholeNumber(1),
    help="Batches at once on this machine (default: 1 with --local, 8 at a server)",
)
@option("--no-preflight", is_flag=True, rare=True, help="Skip the checks of Slurm, image and model")
@settings_options("run", "slurm", "paths")
def gateway(
    port: int | None,
    socket: str | None,
    folder: str | None,
    local: bool,
    at_once: int | None,
    no_preflight: bool,
    **settings: Any,
) -> int:
    """Serve OpenAI's Batch API, for clients on this machine. Each batch becomes a run."""
    for library in _LIBRARIES:
        need(library, "gateway", "aiflux gateway")
    given = {name: v for name, v in given_settings(settings).items() if v is not None}
    config = Config(arguments=given)
    refuse_local_at_url(config, local=local)
    show_unused_settings(kind_named(config.engine), given, local=local)
    most = _most_at_once(config, at_once, local=local)
    config.run_options()
    config.get_slurm_config().checked()
    show_local_choices(config, None)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    root = Path(folder) if folder else state_folder(os.environ) / "gateway"
    try:
        _serve(config, root, given, port, socket, most, local=local, check=not no_preflight)
    except KeyboardInterrupt:
        print("\nstopped; batches continue, and the next start knows them", file=sys.stderr)
    return 0


def _serve(
    config: Config,
    root: Path,
    given: Mapping[str, Any],
    port: int | None,
    path: str | None,
    most: int | None,
    *,
    local: bool,
    check: bool,
) -> None:
    from aiflux.gateway.preflight import check_gateway
    from aiflux.gateway.server import listen_on_port, listen_on_socket, read_key, serve
    from aiflux.gateway.service import Gateway
    from aiflux.gateway.store import GatewayStore

    store = GatewayStore(root)
    place = Path(path).absolute() if path else None
    try:
        key_file = store.root / "key"
        key = read_key(key_file)
        if check:
            for finding in check_gateway(config, store.batches, Path.cwd(), local=local):
                print(f"warning: {finding_text(finding)}", file=sys.stderr)
        named = {name: _kept(config.get(name)) for name in given}
        work = Gateway(store, named, local, Path.cwd(), check, most)
        listener = listen_on_port(port) if place is None else listen_on_socket(place)
        try:
            serve(work, key, listener, lambda: _show_address(listener, place, key_file))
        finally:
            if place is not None:
                place.unlink(missing_ok=True)
    finally:
        store.close()


def _most_at_once(config: Config, given: int | None, *, local: bool) -> int | None:
    """Return how many batches are processed on this machine at once; None with Slurm.

    Raises:
        UsageError: a number is given for Slurm.
    """
    if local:
        return given or _AT_ONCE_LOCAL
    if not kind_named(config.engine).managed:
        return given or _AT_ONCE_AT_SERVER
    if given is not None:
        raise UsageError(
            "--at-once is for batches on this machine, and these are jobs of Slurm",
            "leave it out: Slurm decides which jobs run; or use --local or --engine-url",
        )
    return None


def _kept(value: Any) -> Any:
    """Return a setting's value in a form that JSON can hold, and that holds in any directory."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Mapping):
        return {name: _kept(each) for name, each in value.items()}
    return [_kept(each) for each in value] if isinstance(value, tuple | list) else value


def _show_address(listener: socket.socket, path: Path | None, key_file: Path) -> None:
    if path is None:
        address = f"http://{listener.getsockname()[0]}:{listener.getsockname()[1]}/v1"
    else:
        address = "http://localhost/v1"
    print("ready; in the shell of your client:")
    print(f"  export OPENAI_BASE_URL={address}")
    print(f'  export OPENAI_API_KEY="$(cat {shlex.quote(str(key_file))})"')
    if path is not None:
        print(f"and a client that connects to the socket {path}")
    print("follow batches with aiflux jobs; stop the gateway with Ctrl-C", flush=True)
