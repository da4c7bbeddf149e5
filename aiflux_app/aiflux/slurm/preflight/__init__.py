"""Checks before submission that find jobs which would fail, or wait for ever."""
