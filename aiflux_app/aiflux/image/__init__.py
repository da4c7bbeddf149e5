"""The Apptainer image: building it and reading what is in it.

It works from a checkout of the repository, which holds the definition (``container/``) and the
entry point.
"""

from aiflux.image.base import BaseChoice, BuildOptions, choose_base
from aiflux.image.build import build
from aiflux.image.signing import find_signer, sign, signature

__all__ = [
    "BaseChoice",
    "BuildOptions",
    "build",
    "choose_base",
    "find_signer",
    "sign",
    "signature",
]
