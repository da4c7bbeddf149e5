"""The engine kind `llamacpp`: llama.cpp's server on the GGUF files that Ollama pulled, or any."""
