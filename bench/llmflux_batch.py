"""Run llmflux's BatchProcessor over a file, in a Python with llmflux: INPUT OUTPUT MODEL."""

import sys

from llmflux.core.config import ModelConfig
from llmflux.processors.batch import BatchProcessor


def main(source: str, output: str, model: str) -> None:
    """Process a file with the engine at OLLAMA_HOST."""
    processor = BatchProcessor(ModelConfig(name=model, engine="ollama"), batch_size=32)
    processor.run(source, output, "ollama")


if __name__ == "__main__":
    main(*sys.argv[1:])
