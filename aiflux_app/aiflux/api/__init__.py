"""The Python API: start a run, follow it and read its results (`aiflux.run`)."""
