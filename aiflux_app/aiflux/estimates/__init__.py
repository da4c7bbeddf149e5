"""Estimate a run's duration from a pilot run."""
