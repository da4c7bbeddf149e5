"""The engine kind `ollama`."""
