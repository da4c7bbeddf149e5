llama-server --version
