"""The engine kind `vllm`: models of Hugging Face, served by vLLM."""
