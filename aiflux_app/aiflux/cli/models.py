"""``aiflux models``: have a model pulled, through the image or an Ollama found here."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiflux.core.arguments import add_settings, given_settings
from aiflux.core.config import Config
from aiflux.core.container import find_image, find_runtime
from aiflux.core.modelname import parse_model_name
from aiflux.errors import EngineError, ImageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    pull = actions.add_parser("pull", help="pull a model, on a machine with internet")
    pull.add_argument("name", metavar="NAME:TAG", help="model, as Ollama names it")
    add_settings(pull, "paths")


def execute(arguments: argparse.Namespace) -> int:
    """Pull a model into the models directory."""
    config = Config(arguments=given_settings(arguments))
    parse_model_name(arguments.name)
    try:
        runtime, image = find_runtime(), find_image(config, Path.cwd())
    except ImageError as error:
        return _pull_here(arguments.name, config, error)
    from aiflux.cli.container import pull_in_container

    return pull_in_container(arguments.name, config.models_dir, runtime, image)


def _pull_here(name: str, config: Config, no_image: ImageError) -> int:
    from aiflux.worker.main import pull
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.run import Context
    from aiflux.worker.stopper import Stopper

    context = Context(make_reporter(), Stopper())
    try:
        program = context.ollama
    except EngineError:
        raise no_image from None
    pull(name, config, context, program)
    return 0
