"""Measures the worker, side by side with a plain loop and with llmflux: ``python -m bench``."""
