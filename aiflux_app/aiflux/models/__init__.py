"""Models: names, the catalog, GGUF files and the figures of memory."""
