"""Run llmflux's BatchProcessor over a file, in a Python with llmflux: INPUT OUTPUT MODEL ENGINE."""

import sys

from llmflux.core.config import ModelConfig
from llmflux.processors.batch import BatchProcessor


def main(source: str, output: str, model: str, engine: str) -> None:
    """Process a file with the engine at OLLAMA_HOST or VLLM_HOST."""
    config = ModelConfig(name=model, hf_name=model, engine=engine)
    BatchProcessor(config, batch_size=32).run(source, output, engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
