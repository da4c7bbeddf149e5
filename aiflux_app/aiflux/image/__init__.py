"""The Apptainer image: building it and reading what is in it.

It works from a checkout of the repository, which holds the definition (``container/``) and the
entry point.
"""

from aiflux.image.base import BaseChoice, choose_base
from aiflux.image.build import build
from aiflux.image.options import BuildOptions
from aiflux.image.signing import sign, signature
from aiflux.image.signing_keys import find_signer

__all__ = [
    "BaseChoice",
    "BuildOptions",
    "build",
    "choose_base",
    "find_signer",
    "sign",
    "signature",
]
