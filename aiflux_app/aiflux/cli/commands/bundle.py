"""``aiflux bundle``: pack everything into one file for clusters without internet."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from aiflux.bundle.installer import (
    STOPPED,
    Bundle,
    InstallError,
    meter,
    next_steps,
    places,
    size,
)
from aiflux.bundle.installer import install as install_bundle
from aiflux.bundle.installer import verify as verify_bundle
from aiflux.bundle.model_archive import pack_model
from aiflux.bundle.packages import ARCHITECTURES, PYTHONS, packages, this_architecture
from aiflux.bundle.writer import Ingredients, payload_size, refuse_incomplete, write_bundle
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    FOLDER,
    MODEL,
    Choice,
    argument,
    group,
    option,
    settings_options,
)
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import refuse_precious
from aiflux.engines.base import PackedModel
from aiflux.engines.kinds import kind_named, storing_kind
from aiflux.errors import BundleError, OutputExistsError, StoppedError, StorageError
from aiflux.image.container import find_image
from aiflux.image.sif import how_to_build, machine_arch, read_image, refuse_other_version
from aiflux.models.name import shown_digest
from aiflux.util.extras import EXTRAS
from aiflux.util.text import size_text

_NO_ROOM = "free disk space, or write it elsewhere: -o FILE"


@group("bundle", examples=["aiflux bundle create --model llama3.2:3b -o bundle.tar"])
def bundle() -> None:
    """Pack everything into one file for clusters without internet."""


class PythonVersion(click.ParamType[str]):
    """A version of Python such as 3.11, not older than AI-Flux needs."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the version."""
        match = re.fullmatch(r"3\.(\d{1,2})", value)
        if match is None or int(match[1]) < 10:
            self.fail(f"{value!r} is not 3.10 or a later version, such as 3.11", param, ctx)
        return str(value)


@bundle.command(
    "create",
    examples=["aiflux bundle create --model llama3.2:3b -o bundle.tar"],
    exclusive=[("extras", "no_extras")],
)
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    default="aiflux-bundle.tar",
    help="Bundle to write (default: aiflux-bundle.tar)",
)
@option(
    "-m",
    "--model",
    "names",
    metavar="NAME:TAG",
    type=MODEL,
    multiple=True,
    help="Model to include (repeatable)",
)
@option("--no-image", is_flag=True, help="Leave the image out")
@option(
    "--python",
    "pythons",
    metavar="VERSION",
    type=PythonVersion(),
    multiple=True,
    help=f"The cluster's Python (repeatable; default: {', '.join(PYTHONS)})",
)
@option(
    "--extra",
    "extras",
    metavar="NAME",
    type=Choice(tuple(EXTRAS)),
    multiple=True,
    help=f"Only these of {', '.join(EXTRAS)} (repeatable; default: all)",
)
@option("--no-extras", is_flag=True, help="None of them: 140 MB less for each Python")
@option(
    "--arch",
    metavar="NAME",
    type=Choice(ARCHITECTURES),
    help=f"The cluster's architecture, {' or '.join(ARCHITECTURES)} (default: the image's)",
)
@option("--force", is_flag=True, help="Overwrite an existing bundle")
@settings_options("paths")
def create(
    output: str,
    names: tuple[str, ...],
    no_image: bool,
    pythons: tuple[str, ...],
    extras: tuple[str, ...],
    no_extras: bool,
    arch: str | None,
    force: bool,
    **settings: Any,
) -> int:
    """Create a bundle, on a machine with internet.

    It contains the image, models, all Python packages, their checksums and an installer. The
    models must be in the models directory.
    """
    config = Config(arguments=given_settings(settings))
    target = Path(output).absolute()
    _check_output(target, force)
    images = () if no_image else _images(config, names)
    for image in images:
        refuse_other_version(read_image(image))  # it would not suit the packages of this version
    arch = _architecture(arch, images)
    models = tuple(_model(config.models_dir, name) for name in dict.fromkeys(names))
    versions = tuple(dict.fromkeys(pythons or PYTHONS))
    chosen = () if no_extras else tuple(name for name in EXTRAS if name in (extras or EXTRAS))
    payload = payload_size(images, models)
    _check_room(target, payload)
    read = payload + payload_size(images, ())  # images are hashed first
    with packages(versions, arch, chosen, _say) as wheels:
        parts = Ingredients(images, models, wheels, arch, chosen)
        try:
            written = write_bundle(target, parts, meter(read))
        except StorageError as error:
            raise StorageError(error.message, _NO_ROOM) from error
    for line in _summary(written.contents):
        print(line)
    print(f"{target}  {size_text(written.size)}")
    print(f"sha256:{written.digest}")
    return 0


@bundle.command("install", examples=["aiflux bundle install bundle.tar --prefix /sw/aiflux"])
@argument("file", metavar="BUNDLE", type=FILE, help="The bundle, *.tar")
@option(
    "--prefix",
    metavar="DIR",
    type=FOLDER,
    help="Directory to install to (default: ~/.local/share/aiflux)",
)
@option(
    "--models-dir",
    metavar="DIR",
    type=FOLDER,
    help="Directory of the models (default: PREFIX/models)",
)
def install(file: str, prefix: str | None, models_dir: str | None) -> int:
    """Install a bundle, without a network."""
    path = Path(file)
    with _installer_errors():
        to = places(prefix, models_dir)
        try:
            install_bundle(path, to, print, meter(size(path)))
        except KeyboardInterrupt:
            raise StoppedError(*STOPPED) from None
        print(next_steps(to))
    return 0


@bundle.command("verify", examples=["aiflux bundle verify bundle.tar"])
@argument("file", metavar="BUNDLE", type=FILE, help="The bundle, *.tar")
@json_option("Print the contents as JSON")
def verify(file: str, as_json: bool) -> int:
    """Check every file of a bundle."""
    path = Path(file)
    with _installer_errors():
        found: Bundle = verify_bundle(path, meter(size(path)))
    if as_json:
        print_json({"bundle": path, **found.contents, "files": found.sums})
        return 0
    for line in _summary(found.contents):
        print(line)
    print(f"{path} is complete: all {len(found.sums)} files match their checksums")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check_output(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise BundleError(f"no such directory: {output.parent}", "create it")
    if output.is_dir():
        raise BundleError(f"{output} is a directory", "name a file: -o FILE")
    refuse_precious(output)
    if output.exists() and not force:
        raise OutputExistsError(f"{output} already exists", "use --force to overwrite it")


def _check_room(output: Path, payload: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if payload > free:
        raise StorageError(
            f"the bundle needs more than {size_text(payload)}, and {output.parent} has "
            f"{size_text(free)} free",
            _NO_ROOM,
        )


def _images(config: Config, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the configured image, or else one for each engine that the models need.

    Raises:
        ImageError: an image is missing.
        BundleError: the image that was found has another engine.
    """
    if config.image is not None:
        return (find_image(config, Path.cwd()),)
    chosen = kind_named(config.engine)
    wanted = chosen.name if chosen.worker_in_image else "ollama"
    usual = wanted if chosen.store is None else "ollama"
    kinds = [storing_kind(name) for name in names]
    engines = [usual if kind.store is None else kind.name for kind in kinds] or [wanted]
    return tuple(dict.fromkeys(_image(config, engine) for engine in dict.fromkeys(engines)))


def _image(config: Config, engine: str) -> Path:
    image = find_image(config, Path.cwd(), engine=engine)
    kind, found = kind_named(engine), read_image(image).engine
    if kind.managed and found not in (None, engine):
        raise BundleError(
            f"the models need an image with {kind.title}, and {image} has the engine {found}",
            f"{how_to_build(f'ENGINE={engine}')}, name another image (--image FILE), or use "
            "--no-image",
        )
    return image


def _architecture(asked: str | None, images: Sequence[Path]) -> str:
    """Return the architecture of the wheels; an image of another one is refused."""
    wheels = {machine_arch(each): each for each in ARCHITECTURES}
    known = {image: found for image in images if (found := read_image(image).arch) is not None}
    of_images = (wheels[found] for found in known.values() if found in wheels)
    arch = asked or next(of_images, None) or this_architecture()
    for image, found in known.items():
        if wheels.get(found) != arch:
            raise BundleError(
                f"the image {image} is for {found}, and the bundle for {arch}",
                "name an image of that architecture (--image FILE), or use --no-image",
            )
    return arch


def _model(models_dir: Path, name: str) -> PackedModel:
    packed = pack_model(models_dir, name)
    refuse_incomplete(packed)
    return packed


@contextmanager
def _installer_errors() -> Iterator[None]:
    """Turn the installer's own errors into AI-Flux's."""
    try:
        yield
    except InstallError as error:
        kind = StorageError if error.storage else BundleError
        raise kind(str(error), error.remedy) from error


def _summary(contents: dict[str, Any]) -> Iterator[str]:
    pythons = ", ".join(contents["pythons"])
    yield f"aiflux {contents['aiflux']} for {contents['arch']}, Python {pythons}"
    yield f"extras: {', '.join(contents['extras']) or 'none'}"
    for image in contents["images"]:
        yield f"image: {image['engine'] or 'of unknown content'}, {image['arch']}"
    if not contents["images"]:
        yield "no image"
    for model in contents["models"]:
        yield f"model: {model['name']}, {size_text(model['size'])}, {shown_digest(model['digest'])}"
