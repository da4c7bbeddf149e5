"""Slurm: rendering of batch scripts, and the commands that submit, ask and cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiflux.slurm.runner import SlurmRunner

__all__ = ["SlurmRunner"]


def __getattr__(name: str) -> Any:
    if name == "SlurmRunner":
        from aiflux.slurm.runner import SlurmRunner  # noqa: PLC0415 - importing stays cheap

        return SlurmRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
