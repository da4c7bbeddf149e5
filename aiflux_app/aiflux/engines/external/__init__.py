"""The engine kind `external`: a server that is already running, at ``--engine-url``."""
