"""Measure the worker in comparison with a plain loop and with llmflux: ``python -m bench``."""
