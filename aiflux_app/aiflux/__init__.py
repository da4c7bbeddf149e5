"""AI-Flux: run an open language model over a file of prompts on a Slurm cluster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiflux.api.ask import ask
    from aiflux.api.chain_run import chain
    from aiflux.api.run import Run, open_run, run
    from aiflux.core.batch.results_file import Result
    from aiflux.slurm.run_view import RunState, RunView
else:
    _HOMES = {
        "Result": "aiflux.core.batch.results_file",
        "Run": "aiflux.api.run",
        "RunState": "aiflux.slurm.run_view",
        "RunView": "aiflux.slurm.run_view",
        "ask": "aiflux.api.ask",
        "chain": "aiflux.api.chain_run",
        "open_run": "aiflux.api.run",
        "run": "aiflux.api.run",
    }

    def __getattr__(name: str) -> Any:
        """Import a name on first use: importing this package stays cheap."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


__all__ = ["Result", "Run", "RunState", "RunView", "__version__", "ask", "chain", "open_run", "run"]

__version__ = "1.0.0"
