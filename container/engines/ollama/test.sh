ollama --version
