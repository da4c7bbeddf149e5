vllm --version
