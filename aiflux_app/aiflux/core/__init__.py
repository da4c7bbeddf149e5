"""Scheduler-neutral and engine-neutral core: requests, plan, run directory, journal, results."""
