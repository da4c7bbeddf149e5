"""``aiflux models``: what is known of models, and which are on the disk; have them, carry them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.parser import whole_number
from aiflux.cli.render.models import list_models, show_model
from aiflux.cli.render.progress import byte_bar
from aiflux.cli.start import show_local_choices
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.engines.kinds import kind_named
from aiflux.engines.ollama.staging import (
    changing,
    making_room,
    refuse_read_only,
    remove_model,
    remove_staged,
)
from aiflux.engines.ollama.store import (
    missing_parts,
    model_digest,
    read_manifest,
    refuse_other_digest,
)
from aiflux.errors import EngineError, ExitCode, ImageError, UsageError
from aiflux.image.container import find_image, find_runtime
from aiflux.models.name import ModelName, parse_model_name
from aiflux.util.text import size_text

Action = Callable[[argparse.Namespace, Config], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    def action(name: str, help_text: str, *, model: bool = True) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help_text, description=help_text)
        if model:
            added.add_argument("name", metavar="NAME:TAG", help="model, as Ollama names it")
        add_settings(added, "paths")
        return added

    listed = action("list", "list the models that are known, and those on the disk", model=False)
    listed.add_argument("--here", action="store_true", help="those on the disk only")
    listed.add_argument("--fits", metavar="SIZE", help="those that fit a GPU of SIZE, such as 40GB")
    shown = action("show", "show what is known of a model, and the memory it takes")
    for each in (listed, shown):
        add_json(each, "as JSON")
        some = whole_number(1)
        each.add_argument(
            "--context-length", type=some, default=4096, metavar="N", help="tokens of each slot"
        )
        each.add_argument("--slots", type=some, default=8, metavar="N", help="sequences at once")
    pulled = action("pull", "pull a model, on a machine with internet; goes on where it broke off")
    pulled.add_argument("--again", action="store_true", help="pull it although it is there")
    verified = action("verify", "read every blob of a model and compare it with its digest")
    add_json(verified, "print what was found of each blob as one JSON object")
    exported = action("export", "write a model into one file, to carry it to another machine")
    exported.add_argument("file", metavar="FILE", type=Path, help="tar file to write")
    exported.add_argument("--force", action="store_true", help="replace a file that is there")
    taken = action("import", "take in a model from a file", model=False)
    taken.add_argument("file", metavar="FILE", type=Path, nargs="?", help="what export wrote")
    taken.add_argument("--gguf", metavar="FILE", type=Path, help="a GGUF file, instead")
    taken.add_argument("--name", metavar="NAME:TAG", help="with --gguf: the model's name")
    taken.add_argument(
        "--template", metavar="FILE", type=Path, help="with --gguf: template of its prompts"
    )
    action("remove", "remove a model from the disk; what other models share stays")


def execute(arguments: argparse.Namespace) -> int:
    """Do one thing with models."""
    config = Config(arguments=given_settings(vars(arguments)))
    return _ACTIONS[arguments.action](arguments, config)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _pull(arguments: argparse.Namespace, config: Config) -> int:
    if arguments.again or missing_parts(config.models_dir, parse_model_name(arguments.name)):
        refuse_read_only(config.models_dir)
    found = _find_image(config)
    if isinstance(found, ImageError):
        return _pull_here(arguments.name, config, found, again=arguments.again)
    from aiflux.cli.start import pull_in_container

    return pull_in_container(arguments.name, config.models_dir, *found, again=arguments.again)


def _find_image(config: Config) -> tuple[Path, Path] | ImageError:
    """Return the runtime and the image; the error where an Ollama found here is to do it."""
    from aiflux.engines.process import named_program

    program = named_program(kind_named("ollama"), os.environ)
    if program:
        return ImageError(f"the environment names an Ollama that cannot be run: {program}")
    try:
        found = find_runtime(), find_image(config, Path.cwd())
    except ImageError as error:
        return error
    show_local_choices(config, found[1])
    return found


def _pull_here(name: str, config: Config, no_image: ImageError, *, again: bool) -> int:
    from aiflux.engines.process import engine_program
    from aiflux.worker.main import pull
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context
    from aiflux.worker.stop import Stopper

    context = Context(make_reporter(), Stopper())
    context.stopper.install()
    try:
        engine_program(kind_named("ollama"), context.environ)
    except EngineError:
        raise no_image from None
    try:
        pull(name, config, context, again=again)
    finally:
        context.reporter.close()
    return 0


def _verify(arguments: argparse.Namespace, config: Config) -> int:
    from aiflux.engines.ollama.store import check_blobs, refuse_damaged

    name = parse_model_name(arguments.name)
    manifest = read_manifest(config.models_dir, name)
    refuse_other_digest(name, manifest.digest, str(config.models_dir))
    with byte_bar(f"verifying {name.served}", manifest.size) as on_bytes:
        verdicts = [*check_blobs(config.models_dir, manifest, on_bytes)]
    if arguments.json:
        blobs = {each.layer.digest: each.state for each in verdicts}
        print_json({"model": name.served, "digest": manifest.digest, "size": manifest.size,
                    "blobs": blobs})  # fmt: skip
        refuse_damaged(name, config.models_dir, verdicts)
        return 0
    refuse_damaged(name, config.models_dir, verdicts)
    print(
        f"{name.served} is whole: {len(verdicts)} blobs, {size_text(manifest.size)}, "
        f"sha256:{manifest.digest}"
    )
    return 0


def _export(arguments: argparse.Namespace, config: Config) -> int:
    from aiflux.bundle.model_archive import export_model

    name = parse_model_name(arguments.name)
    manifest = read_manifest(config.models_dir, name)
    refuse_other_digest(name, manifest.digest, str(config.models_dir))
    _refuse_target(arguments.file, force=arguments.force)
    with byte_bar(f"exporting {name.served}", manifest.size) as on_bytes:
        export_model(config.models_dir, name, arguments.file, on_bytes)
    size = size_text(arguments.file.stat().st_size)
    print(f"{name.served} is in {arguments.file} ({size}), sha256:{manifest.digest}")
    print(f"  there: aiflux models import {arguments.file.name}")
    return 0


def _refuse_target(path: Path, *, force: bool) -> None:
    if str(path) == "-" or (path.exists() and not path.is_file()):
        raise UsageError(
            f"{path} is no regular file, and an archive is written beside its target and renamed",
            "name a file",
        )
    if path.exists() and not force:
        raise UsageError(f"the file {path} is there already", "give --force to replace it")


def _import(arguments: argparse.Namespace, config: Config) -> int:
    if (arguments.file is None) == (arguments.gguf is None):
        raise UsageError(
            "models import takes one file", "name an archive, or a GGUF file with --gguf FILE"
        )
    refuse_read_only(config.models_dir)
    if arguments.gguf is not None:
        return _import_gguf(arguments, config)
    if arguments.name or arguments.template:
        raise UsageError("--name and --template are for --gguf", "an archive has a name of its own")
    from aiflux.bundle.model_archive import import_model, read_archive

    archive = read_archive(arguments.file)
    with byte_bar(f"importing {archive.name.served}", archive.manifest.size) as on_bytes:
        import_model(config.models_dir, arguments.file, say=_say, on_bytes=on_bytes)
    print(f"{archive.name.served} is in {config.models_dir}, sha256:{archive.manifest.digest}")
    return 0


def _import_gguf(arguments: argparse.Namespace, config: Config) -> int:
    from aiflux.engines.ollama.staging import stage_gguf

    if arguments.name is None:
        raise UsageError("--gguf needs a name for the model", "--name NAME:TAG")
    name = replace(parse_model_name(arguments.name), insecure=False, digest="")
    template = _template(arguments.template)
    with changing(config.models_dir, f"importing {name.served}", _say):
        try:
            size = arguments.gguf.stat().st_size if arguments.gguf.is_file() else 0
            with byte_bar(f"copying {arguments.gguf.name}", size) as on_bytes:
                stage_gguf(config.models_dir, name, arguments.gguf, template, on_bytes)
            code = _create(name, config)
        finally:
            remove_staged(config.models_dir, name)
    if code == 0 and not missing_parts(config.models_dir, name):
        digest = model_digest(config.models_dir, name)
        print(f"{name.served} is in {config.models_dir}, sha256:{digest}")
    return code


def _template(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the template {path} cannot be read: {error}", "check it") from error


def _create(name: ModelName, config: Config) -> int:
    found = _find_image(config)
    if not isinstance(found, ImageError):
        from aiflux.cli.start import create_in_container

        return create_in_container(name.served, config.models_dir, *found)
    from aiflux.engines.process import find_program
    from aiflux.worker.main import create
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context
    from aiflux.worker.stop import Stopper

    context = Context(make_reporter(), Stopper())
    if find_program(kind_named("ollama"), os.environ) is None:
        raise found
    context.stopper.install()
    try:
        create(name.served, config, context)
    finally:
        context.reporter.close()
    return 0


def _remove(arguments: argparse.Namespace, config: Config) -> int:
    name = parse_model_name(arguments.name)
    refuse_read_only(config.models_dir)
    if not (config.models_dir / name.manifest_path).exists() and config.models_dir.is_dir():
        with making_room(config.models_dir, f"removing {name.served}", _say):
            removed = remove_staged(config.models_dir, name)
        if removed:
            print(f"what was pulled of {name.served} is removed from {config.models_dir}")
            return int(ExitCode.OK)
    read_manifest(config.models_dir, name)
    freed = remove_model(config.models_dir, name, _say)
    print(f"{name.served} is removed from {config.models_dir}; {size_text(freed)} are free again")
    return int(ExitCode.OK)


def _list(arguments: argparse.Namespace, config: Config) -> int:
    list_models(arguments, config)
    return 0


def _show(arguments: argparse.Namespace, config: Config) -> int:
    show_model(arguments, config)
    return 0


_ACTIONS: dict[str, Action] = {
    "list": _list,
    "show": _show,
    "pull": _pull,
    "verify": _verify,
    "export": _export,
    "import": _import,
    "remove": _remove,
}
