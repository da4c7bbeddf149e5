"""Estimates: how long a run will take, from a pilot of it."""
