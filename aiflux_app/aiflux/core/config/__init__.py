"""The settings: one table of them, the layers that set them, and `Config`."""

from aiflux.core.config.config import Config

__all__ = ["Config"]
