"""Checks before submission for jobs that would fail, or wait forever."""
