"""``aiflux image``: build the Apptainer image, and tell what is in one."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path

from rich.table import Table

from aiflux.cli.json_output import add_json, print_json
from aiflux.core.config.config import Config
from aiflux.errors import ImageError
from aiflux.image.base import BuildOptions
from aiflux.image.build import build
from aiflux.image.container import find_image
from aiflux.image.sif import own_image
from aiflux.image.signing import find_signer, sign, signature
from aiflux.worker.console import TerminalConsole

_PIPED = 4096  # columns; what a program reads is not folded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    build_parser = actions.add_parser("build", help="build the image (no root needed)")
    add = build_parser.add_argument
    add(
        "--base",
        choices=("auto", "docker", "debian"),
        default="auto",
        help="what it is made of: the official Ollama image, or Debian (default: what can be had)",
    )
    add("--output", metavar="FILE", default="aiflux.sif", help="the image (default: aiflux.sif)")
    add("--ollama-image", metavar="REF", help="docker base, docker://HOST/NAME:TAG")
    add("--ollama-tarball", metavar="FILE", help="official Ollama archive")
    add("--mirror", metavar="URL", help="Debian mirror (default: this machine's)")
    add("--suite", metavar="NAME", help="Debian suite (default: this machine's)")
    add("--force", action="store_true", help="replace an image that is there")
    add("--sign", action="store_true", help="sign it with a PGP key of Apptainer's keyring")
    _add_key(build_parser)
    signed = actions.add_parser("sign", help="sign an image with a PGP key")
    signed.add_argument("file", metavar="FILE", nargs="?", help="image (default: the one runs use)")
    _add_key(signed)
    shown = actions.add_parser("info", help="tell what is in an image")
    shown.add_argument("file", metavar="FILE", nargs="?", help="image (default: the one runs use)")
    add_json(shown, "as one JSON object")


def execute(arguments: argparse.Namespace) -> int:
    """Carry out the action that was named."""
    actions = {"build": _build, "sign": _sign, "info": _info}
    return actions[arguments.action](arguments)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", metavar="N", type=int, help="which key, by apptainer key list --secret"
    )


def _build(arguments: argparse.Namespace) -> int:
    options = BuildOptions(
        output=Path(arguments.output),
        base=arguments.base,
        ollama_image=arguments.ollama_image,
        ollama_tarball=Path(arguments.ollama_tarball) if arguments.ollama_tarball else None,
        mirror=arguments.mirror,
        suite=arguments.suite,
        force=arguments.force,
        sign=arguments.sign,
        key=arguments.key,
    )
    image = build(options, _say, _ask)
    print(image)
    if options.sign:
        _say(signature(image).words)
    return 0


def _named(arguments: argparse.Namespace) -> Path:
    return Path(arguments.file) if arguments.file else find_image(Config(), Path.cwd())


def _sign(arguments: argparse.Namespace) -> int:
    image = _named(arguments)
    own_image(image)
    sign(image, find_signer(arguments.key, _ask))
    print(f"{image}: {signature(image).words}")
    return 0


def _signature(image: Path) -> str:
    try:
        return signature(image).words
    except ImageError as error:
        return error.message


def _info(arguments: argparse.Namespace) -> int:
    found = own_image(_named(arguments))
    if arguments.json:
        signed = {"signature": _signature(found.path)}
        print_json({"image": found.path, **dict(found.facts), **signed})
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("image", str(found.path))
    for name, value in sorted(found.facts.items()):
        table.add_row(name, value)
    table.add_row("signature", _signature(found.path))
    width = None if sys.stdout.isatty() else _PIPED
    TerminalConsole(highlight=False, markup=False, width=width).print(table)
    return 0


def _ask(what: str) -> str | None:
    """Ask without showing what is typed; without a terminal, take a line of standard input."""
    try:
        if sys.stdin.isatty():
            return getpass.getpass(what)
    except EOFError:
        return None
    return sys.stdin.readline().rstrip("\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
