"""``aiflux bundle``: everything in one file, for clusters without internet."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiflux.bundle.installer import (
    STOPPED,
    Bundle,
    InstallError,
    add_options,
    install,
    meter,
    next_steps,
    places,
    size,
    verify,
)
from aiflux.bundle.writer import Ingredients, payload_size, refuse_incomplete, write_bundle
from aiflux.cli.json_output import add_json, print_json
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.engines.ollama.store import read_manifest, refuse_other_digest
from aiflux.errors import BundleError, OutputExistsError, StoppedError, StorageError
from aiflux.image.container import find_image
from aiflux.image.sif import machine_arch, read_image
from aiflux.models.name import ModelName, parse_model_name
from aiflux.util.extras import EXTRAS
from aiflux.util.text import size_text

_NO_ROOM = "make room, or write it elsewhere: -o FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _add_create(actions.add_parser("create", help="make a bundle, on a machine with internet"))
    add_options(actions.add_parser("install", help="install a bundle, without a network"))
    checked = actions.add_parser("verify", help="check every file of a bundle")
    checked.add_argument("bundle", metavar="BUNDLE", type=Path, help="the file")
    add_json(checked, "print what is in it as one JSON object")


def _add_create(parser: argparse.ArgumentParser) -> None:
    from aiflux.bundle.wheels import ARCHITECTURES, PYTHONS

    parser.description = (
        "Put the image, models and all Python packages into one file, with their checksums and "
        "what installs them. The models have to be in the models directory."
    )
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", default="aiflux-bundle.tar", help="default: %(default)s")
    add("--model", metavar="NAME:TAG", dest="names", action="append", default=[], help="repeatable")
    add("--no-image", action="store_true", help="leave the image out")
    add(
        "--python", metavar="VERSION", action="append", type=python_version,
        help=f"of the cluster; repeatable (default: {', '.join(PYTHONS)})",
    )  # fmt: skip
    extras = parser.add_mutually_exclusive_group()
    extras.add_argument(
        "--extra", metavar="NAME", dest="extras", action="append", choices=EXTRAS,
        help=f"only these of {', '.join(EXTRAS)}; repeatable (default: all)",
    )  # fmt: skip
    extras.add_argument(
        "--no-extras", action="store_true", help="none of them: 100 MB less a Python"
    )
    add("--arch", choices=ARCHITECTURES, help="of the cluster (default: the image's)")
    add("--force", action="store_true", help="replace a bundle that is there")
    add_settings(parser, "paths")


def python_version(text: str) -> str:
    """Return a version of Python such as 3.11.

    Raises:
        argparse.ArgumentTypeError: it is none, or older than what AI-Flux needs.
    """
    match = re.fullmatch(r"3\.(\d{1,2})", text)
    if match is None or int(match[1]) < 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not 3.10 or a later one, as in 3.11")
    return text


def execute(arguments: argparse.Namespace) -> int:
    """Carry out the action that was named."""
    actions = {"create": _create, "install": _install, "verify": _verify}
    return actions[arguments.action](arguments)


def _create(arguments: argparse.Namespace) -> int:
    from aiflux.bundle.wheels import PYTHONS, packages

    config = Config(arguments=given_settings(vars(arguments)))
    output = Path(arguments.output).absolute()
    _check_output(output, arguments.force)
    image = None if arguments.no_image else find_image(config, Path.cwd())
    arch = _architecture(arguments.arch, image)
    models = tuple(_model(config.models_dir, name) for name in dict.fromkeys(arguments.names))
    pythons = tuple(dict.fromkeys(arguments.python or PYTHONS))
    extras = _extras(arguments)
    payload = payload_size(image, config.models_dir, models)
    _check_room(output, payload)
    read = payload + (image.stat().st_size if image else 0)  # it is hashed first
    with packages(pythons, arch, extras, _say) as wheels:
        parts = Ingredients(image, config.models_dir, models, wheels, arch, extras)
        try:
            written = write_bundle(output, parts, meter(read))
        except StorageError as error:
            raise StorageError(error.message, _NO_ROOM) from error
    for line in _summary(written.contents):
        print(line)
    print(f"{output}  {size_text(written.size)}")
    print(f"sha256:{written.digest}")
    return 0


def _extras(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.no_extras:
        return ()
    return tuple(name for name in EXTRAS if name in (arguments.extras or EXTRAS))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check_output(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise BundleError(f"the directory {output.parent} is not there", "make it")
    if output.is_dir():
        raise BundleError(f"{output} is a folder", "name a file: -o FILE")
    if output.exists() and not force:
        raise OutputExistsError(f"{output} is there already", "say --force to replace it")


def _check_room(output: Path, payload: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if payload > free:
        raise StorageError(
            f"the bundle will have {size_text(payload)} and more, and {output.parent} has "
            f"{size_text(free)} free",
            _NO_ROOM,
        )


def _architecture(asked: str | None, image: Path | None) -> str:
    """Return what the wheels are to be for; an image for another one is refused."""
    from aiflux.bundle.wheels import ARCHITECTURES, this_architecture

    known = None if image is None else read_image(image).arch
    of_image = next((each for each in ARCHITECTURES if machine_arch(each) == known), None)
    arch = asked or of_image or this_architecture()
    if known is not None and of_image != arch:
        raise BundleError(
            f"the image {image} is for {known}, and the bundle for {arch}",
            "name an image of that architecture (--image FILE), or say --no-image",
        )
    return arch


def _model(models_dir: Path, text: str) -> ModelName:
    name = parse_model_name(text)
    manifest = read_manifest(models_dir, name)
    refuse_other_digest(name, manifest.digest, str(models_dir))
    refuse_incomplete(models_dir, name)
    return name


def _install(arguments: argparse.Namespace) -> int:
    with _told():
        to = places(arguments.prefix, arguments.models_dir)
        try:
            install(arguments.bundle, to, print, meter(size(arguments.bundle)))
        except KeyboardInterrupt:
            raise StoppedError(*STOPPED) from None
        print(next_steps(to))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with _told():
        bundle: Bundle = verify(arguments.bundle, meter(size(arguments.bundle)))
    if arguments.json:
        print_json({"bundle": arguments.bundle, **bundle.contents, "files": bundle.sums})
        return 0
    for line in _summary(bundle.contents):
        print(line)
    print(f"{arguments.bundle} is whole: {len(bundle.sums)} files are what their checksums say")
    return 0


@contextmanager
def _told() -> Iterator[None]:
    """Turn the installer's own error into one of AI-Flux's."""
    try:
        yield
    except InstallError as error:
        kind = StorageError if error.storage else BundleError
        raise kind(str(error), error.remedy) from error


def _summary(contents: dict[str, Any]) -> Iterator[str]:
    pythons = ", ".join(contents["pythons"])
    yield f"aiflux {contents['aiflux']} for {contents['arch']}, Python {pythons}"
    yield f"extras: {', '.join(contents['extras']) or 'none'}"
    image = contents["image"]
    yield (
        f"image: {image['engine'] or 'of unknown content'}, {image['arch']}"
        if image
        else "no image"
    )
    for model in contents["models"]:
        yield f"model: {model['name']}, {size_text(model['size'])}, {model['digest']}"
