"""A run's state on disk: plan, shards, run directory, journal, status and output."""
