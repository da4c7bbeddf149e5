"""``aiflux models``: list, pull, check and move models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    MODEL,
    Function,
    WholeNumber,
    argument,
    group,
    option,
    settings_options,
)
from aiflux.cli.render.models import (
    Known,
    KnownSnapshot,
    find_model,
    find_models,
    find_snapshot,
    find_snapshots,
    model_lines,
    models_table,
    parse_size,
    snapshot_lines,
    snapshots_table,
    stored_json,
)
from aiflux.cli.render.progress import byte_bar
from aiflux.cli.run_argument import make_console
from aiflux.cli.start import create_in_container, pull_in_container, show_local_choices
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import refuse_precious
from aiflux.engines.base import ModelStore
from aiflux.engines.kinds import kind_named, storing_kind
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
from aiflux.errors import EngineError, ImageError, ModelError, UsageError
from aiflux.image.container import find_image, find_runtime
from aiflux.models.name import ModelName, parse_model_name, shown_digest
from aiflux.util.files import named_file
from aiflux.util.text import error_text, size_text


@group("models", examples=["aiflux models pull llama3.2:3b", "aiflux models list --fits 40GB"])
def models() -> None:
    """List, pull, check and move models."""


def _model_argument(function: Function) -> Function:
    return argument("name", metavar="NAME:TAG", type=MODEL, help="Model, such as llama3.2:3b")(
        function
    )


def _memory_options(function: Function) -> Function:
    function = option(
        "--slots",
        type=WholeNumber(1),
        default=8,
        metavar="N",
        help="Sequences in parallel, for the GPU memory (default: 8)",
    )(function)
    return option(
        "--context-length",
        type=WholeNumber(1),
        default=4096,
        metavar="N",
        help="Tokens of context for each slot, for the GPU memory (default: 4096)",
    )(function)


def _config(settings: Mapping[str, Any]) -> Config:
    return Config(arguments=given_settings(settings))


@models.command("list", examples=["aiflux models list --fits 40GB"])
@option("--here", is_flag=True, help="Only models in the models directory")
@option("--fits", metavar="SIZE", help="Only models that fit a GPU of this size, such as 40GB")
@_memory_options
@json_option("Print JSON")
@settings_options("paths")
def list_(
    here: bool,
    fits: str | None,
    context_length: int,
    slots: int,
    as_json: bool,
    **settings: Any,
) -> int:
    """List the models of the catalog and of the models directory."""
    config = _config(settings)
    room = None if fits is None else parse_size(fits)
    found = find_models(config, context_length, slots, here=here, room=room)
    snapshots = find_snapshots(config, context_length, slots, here=here, room=room)
    if as_json:
        known: list[Known | KnownSnapshot] = [*found, *snapshots]
        print_json([each.to_json(context_length, slots) for each in known])
        return 0
    console = make_console()
    width = console.width if console.is_terminal else None
    for line in models_table(found, config.models_dir, context_length, slots, width):
        print(line)
    for line in snapshots_table(snapshots, config.models_dir, context_length, slots, width):
        print(line)
    return 0


@models.command("show", examples=["aiflux models show llama3.3:70b --slots 16"])
@_model_argument
@_memory_options
@json_option("Print JSON")
@settings_options("paths")
def show(name: str, context_length: int, slots: int, as_json: bool, **settings: Any) -> int:
    """Show what is known about a model, and the GPU memory it needs."""
    config = _config(settings)
    hub = storing_kind(name).store is not None
    model = find_snapshot(config, name) if hub else find_model(config, name)
    if as_json:
        print_json(model.to_json(context_length, slots))
        return 0
    for line in (
        snapshot_lines(model, config.models_dir, context_length, slots)
        if isinstance(model, KnownSnapshot)
        else model_lines(model, config.models_dir)
    ):
        print(line)
    return 0


@models.command("pull", examples=["aiflux models pull llama3.2:3b"])
@_model_argument
@option("--again", is_flag=True, help="Pull a model that already exists again")
@settings_options("paths")
def pull(name: str, again: bool, **settings: Any) -> int:
    """Pull a model, on a machine with internet. An interrupted pull continues."""
    config = _config(settings)
    if storing_kind(name).store is not None:
        return _pull_here(name, config, None, again=again)
    if again or missing_parts(config.models_dir, parse_model_name(name)):
        refuse_read_only(config.models_dir)
    found = _find_image(config)
    if isinstance(found, ImageError):
        return _pull_here(name, config, found, again=again)
    return pull_in_container(name, config.models_dir, found, again=again)


@models.command("verify", examples=["aiflux models verify llama3.2:3b"])
@_model_argument
@json_option("Print the state of each blob as JSON")
@settings_options("paths")
def verify(name: str, as_json: bool, **settings: Any) -> int:
    """Read every blob of a model and compare it with its digest."""
    from aiflux.engines.ollama.store import check_blobs, refuse_damaged

    folder = _config(settings).models_dir
    store = storing_kind(name).store
    if store is not None:
        return _verify_stored(store, folder, name, as_json=as_json)
    model = parse_model_name(name)
    manifest = read_manifest(folder, model)
    refuse_other_digest(model, manifest.digest, str(folder))
    with byte_bar(f"verifying {model.served}", manifest.size) as on_bytes:
        blobs = [*check_blobs(folder, manifest, on_bytes)]
    if as_json:
        states = {each.layer.digest: each.state for each in blobs}
        print_json({"model": model.served, "digest": manifest.digest, "size": manifest.size,
                    "blobs": states})  # fmt: skip
        refuse_damaged(model, folder, blobs)
        return 0
    refuse_damaged(model, folder, blobs)
    print(
        f"{model.served} is complete: {len(blobs)} blobs, {size_text(manifest.size)}, "
        f"sha256:{manifest.digest}"
    )
    return 0


@models.command(
    "export",
    examples=[
        "aiflux models export llama3.2:3b llama.tar",
        "aiflux models export hf:Qwen/Qwen3-8B qwen.tar",
    ],
)
@_model_argument
@argument("file", metavar="FILE", type=FILE, help="Archive to write, *.tar")
@option("--force", is_flag=True, help="Overwrite an existing file")
@settings_options("paths")
def export(name: str, file: str, force: bool, **settings: Any) -> int:
    """Write a model to one file, for another machine."""
    from aiflux.bundle.model_archive import export_model, pack_model, packed_size

    target = Path(file)
    packed = pack_model(_config(settings).models_dir, name)
    _refuse_target(target, force=force)
    with byte_bar(f"exporting {packed.name}", packed_size(packed)) as on_bytes:
        export_model(packed, target, on_bytes)
    size = size_text(target.stat().st_size)
    print(f"wrote {packed.name} to {target} ({size}), {shown_digest(packed.digest)}")
    print(f"  on the other machine: aiflux models import {quote(target.name)}")
    return 0


@models.command(
    "import",
    examples=["aiflux models import llama.tar"],
    exclusive=[("file", "gguf")],
)
@argument("file", required=False, metavar="[FILE]", type=FILE, help="Archive from export, *.tar")
@option("--gguf", metavar="FILE", type=FILE, help="GGUF file to import instead")
@option("--name", metavar="NAME:TAG", help="With --gguf: the model's name")
@option("--template", metavar="FILE", type=FILE, help="With --gguf: its prompt template")
@settings_options("paths")
def import_(
    file: str | None, gguf: str | None, name: str | None, template: str | None, **settings: Any
) -> int:
    """Import a model from a file."""
    config = _config(settings)
    if gguf is not None:
        if name is None:
            raise UsageError("--gguf needs a name for the model", "--name NAME:TAG")
        model = replace(parse_model_name(name), insecure=False, digest="")
        refuse_read_only(config.models_dir)
        return _import_gguf(model, Path(gguf), _template(template), config)
    if file is None:
        raise UsageError(
            "aiflux models import needs a file", "name an archive, or a GGUF file with --gguf FILE"
        )
    refuse_read_only(config.models_dir)
    if name or template:
        raise UsageError("--name and --template need --gguf", "an archive has its own model name")
    from aiflux.bundle.model_archive import import_model, read_archive

    archive = read_archive(Path(file))
    with byte_bar(f"importing {archive.name}", archive.manifest.size) as on_bytes:
        import_model(config.models_dir, Path(file), say=_say, on_bytes=on_bytes)
    print(f"imported {archive.name} to {config.models_dir}, {shown_digest(archive.digest)}")
    return 0


@models.command("remove", examples=["aiflux models remove llama3.2:3b"])
@_model_argument
@settings_options("paths")
def remove(name: str, **settings: Any) -> int:
    """Remove a model from the models directory; files of other models stay."""
    folder = _config(settings).models_dir
    refuse_read_only(folder)
    store = storing_kind(name).store
    if store is not None:
        freed = store.remove(folder, name, _say)
        print(f"removed {name} from {folder}, which freed {size_text(freed)}")
        return 0
    model = parse_model_name(name)
    if not (folder / model.manifest_path).exists() and folder.is_dir():
        with making_room(folder, f"removing {model.served}", _say):
            removed = remove_staged(folder, model)
        if removed:
            print(f"removed the partial pull of {model.served} from {folder}")
            return 0
    read_manifest(folder, model)
    freed = remove_model(folder, model, _say)
    print(f"removed {model.served} from {folder}, which freed {size_text(freed)}")
    return 0


def _verify_stored(store: ModelStore, folder: Path, name: str, *, as_json: bool) -> int:
    stored = store.find(folder, name)
    with byte_bar(f"verifying {name}", stored.size) as on_bytes:
        wrong = store.damaged(folder, name, on_bytes)
    if as_json:
        print_json({**stored_json(stored), "problems": wrong})
    if wrong:
        raise ModelError(
            f"{name} in {folder} is damaged: {'; '.join(wrong)}",
            f"pull it again: aiflux models pull --again {name}",
        )
    if not as_json:
        print(f"{name} is complete: {size_text(stored.size)}, commit {stored.digest}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _find_image(config: Config) -> Path | ImageError:
    """Return the image; the error if an Ollama of this machine is used."""
    from aiflux.engines.process import named_program

    program = named_program(kind_named("ollama"), os.environ)
    if program:
        return ImageError(f"the environment names an Ollama that cannot be run: {program}")
    try:
        find_runtime()
        image = find_image(config, Path.cwd(), engine="ollama")
    except ImageError as error:
        return error
    show_local_choices(config, image)
    return image


def _pull_here(name: str, config: Config, no_image: ImageError | None, *, again: bool) -> int:
    """Pull a model with programs of this machine.

    Args:
        no_image: the error if Ollama is needed and missing here, too; None if it is not needed.
    """
    from aiflux.engines.process import engine_program
    from aiflux.worker.main import pull as pull_model
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context
    from aiflux.worker.stop import Stopper

    context = Context(make_reporter(), Stopper())
    context.stopper.install()
    if no_image is not None:
        try:
            engine_program(kind_named("ollama"), context.environ)
        except EngineError:
            raise no_image from None
    try:
        pull_model(name, config, context, again=again)
    finally:
        context.reporter.close()
    return 0


def _refuse_target(path: Path, *, force: bool) -> None:
    if str(path) == "-" or (path.exists() and not path.is_file()):
        raise UsageError(
            f"{path} is not a regular file: the archive is written to a temporary file next to its "
            "target and renamed",
            "name a file",
        )
    refuse_precious(path)
    if path.exists() and not force:
        raise UsageError(f"{path} already exists", "use --force to overwrite it")


def _import_gguf(name: ModelName, gguf: Path, template: str | None, config: Config) -> int:
    from aiflux.engines.ollama.staging import stage_gguf

    size = named_file(gguf, "use a GGUF file").stat().st_size
    with changing(config.models_dir, f"importing {name.served}", _say):
        try:
            with byte_bar(f"copying {gguf.name}", size) as on_bytes:
                stage_gguf(config.models_dir, name, gguf, template, on_bytes)
            code = _create(name, config)
        finally:
            remove_staged(config.models_dir, name)
    if code == 0 and not missing_parts(config.models_dir, name):
        digest = model_digest(config.models_dir, name)
        print(f"imported {name.served} to {config.models_dir}, sha256:{digest}")
    return code


def _template(path: str | None) -> str | None:
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the template {path} cannot be read: {error_text(error)}", "check it"
        ) from error


def _create(name: ModelName, config: Config) -> int:
    found = _find_image(config)
    if not isinstance(found, ImageError):
        return create_in_container(name.served, config.models_dir, found)
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
