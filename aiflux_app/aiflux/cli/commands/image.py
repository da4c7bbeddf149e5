"""``aiflux image``: build, sign and inspect the Apptainer image."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, Choice, Function, WholeNumber, argument, group, option
from aiflux.core.config.config import Config
from aiflux.core.config.settings import NVIDIA, VENDOR_TITLES
from aiflux.errors import ImageError
from aiflux.image.base import ENGINES, BuildOptions
from aiflux.image.build import build as build_image
from aiflux.image.container import find_image, image_names
from aiflux.image.sif import own_image
from aiflux.image.signing import find_signer, signature
from aiflux.image.signing import sign as sign_image
from aiflux.worker.console import TerminalConsole

_PIPED = 4096  # columns: lines for other programs are not wrapped


@group("image", examples=["aiflux image build", "aiflux image info"])
def image() -> None:
    """Build, sign or inspect the Apptainer image."""


def _key_option(function: Function) -> Function:
    return option(
        "--key", metavar="N", type=WholeNumber(), help="Index in apptainer key list --secret"
    )(function)


def _image_argument(function: Function) -> Function:
    return argument(
        "file",
        required=False,
        metavar="[FILE]",
        type=FILE,
        help="Image (default: the one that runs use)",
    )(function)


@image.command("build", examples=["aiflux image build --base docker --output aiflux.sif"])
@option(
    "--engine",
    type=Choice(tuple(ENGINES)),
    metavar="KIND",
    default="ollama",
    help=f"Engine in the image: {', '.join(ENGINES)} (default: ollama)",
)
@option(
    "--gpu",
    type=Choice(tuple(VENDOR_TITLES)),
    metavar="VENDOR",
    default=NVIDIA,
    help=f"Vendor of the GPUs: {', '.join(VENDOR_TITLES)} (default: {NVIDIA})",
)
@option(
    "--base",
    type=Choice(("auto", "docker", "debian")),
    metavar="NAME",
    default="auto",
    help="The engine's image (docker) or Debian (debian); default: auto, what is available",
)
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="Image to write (default: aiflux.sif, or aiflux-KIND.sif; aiflux-[KIND-]amd.sif for AMD)",
)
@option("--force", is_flag=True, help="Overwrite an existing image")
@option("--sign", is_flag=True, help="Sign it with a PGP key of Apptainer's keyring")
@_key_option
@option(
    "--base-image",
    "--ollama-image",
    metavar="REF",
    help="Image for the docker base, docker://HOST/NAME:TAG",
)
@option("--ollama-tarball", metavar="FILE", type=FILE, help="Official Ollama archive")
@option("--mirror", metavar="URL", help="Debian mirror (default: this machine's)")
@option("--suite", metavar="NAME", help="Debian suite (default: this machine's)")
def build(output: str | None, ollama_tarball: str | None, **more: Any) -> int:
    """Build the image. Root is not needed."""
    tarball = Path(ollama_tarball) if ollama_tarball else None
    path = Path(output or image_names(more["engine"], more["gpu"])[0])
    options = BuildOptions(output=path, ollama_tarball=tarball, **more)
    built = build_image(options, _say, _ask)
    print(built)
    if options.sign:
        _say(signature(built).words)
    return 0


def _named(file: str | None) -> Path:
    return Path(file) if file else find_image(Config(), Path.cwd())


@image.command("sign", examples=["aiflux image sign aiflux.sif"])
@_image_argument
@_key_option
def sign(file: str | None, key: int | None) -> int:
    """Sign an image with a PGP key."""
    signed = _named(file)
    own_image(signed)
    sign_image(signed, find_signer(key, _ask))
    print(f"{signed}: {signature(signed).words}")
    return 0


def _signature(image: Path) -> str:
    try:
        return signature(image).words
    except ImageError as error:
        return error.message


@image.command("info", examples=["aiflux image info aiflux.sif"])
@_image_argument
@json_option("Print JSON")
def info(file: str | None, as_json: bool) -> int:
    """Show what an image contains, and its signature."""
    found = own_image(_named(file))
    if as_json:
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
    """Ask without echoing the answer; without a terminal, read a line of standard input."""
    try:
        if sys.stdin.isatty():
            return getpass.getpass(what)
    except EOFError:
        return None
    return sys.stdin.readline().rstrip("\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
