"""The engine kind `llamacpp`: llama.cpp's server with GGUF files, pulled by Ollama or your own."""
