"""Models: names, the catalog, memory figures, and the files of a models directory."""
