"""Measure transformers' continuous batching without server: MODEL LEVELS PROMPT ANSWER SECONDS.

Runs in the engine's Python, loads the model once, and prints one JSON line per level: output tokens
per second with that many requests in flight.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any


def _measure(manager: Any, level: int, lengths: Sequence[int], prompt: int, rng: Any) -> float:
    """Keep ``level`` requests in flight until all are done; return tokens per second."""
    vocabulary = manager.model.config.vocab_size
    left = iter(lengths)

    def add(count: int) -> None:
        for length in itertools.islice(left, count):
            ids = [rng.randrange(256, vocabulary - 2) for _ in range(prompt)]
            manager.add_request(ids, max_new_tokens=length)

    began = time.monotonic()
    add(level)
    tokens = 0
    for _ in lengths:
        result = None
        while result is None:
            result = manager.get_result(timeout=1)
            assert manager.is_running(), "the engine ended"
        assert result.error is None, result.error
        tokens += len(result.generated_tokens)
        add(1)
    assert tokens == sum(lengths)
    return tokens / (time.monotonic() - began)


def main(model_path: str, levels: Sequence[int], prompt: int, answer: int, seconds: float) -> None:
    """Load the model and measure every level."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").to(device)
    manager = model.init_continuous_batching()
    manager.start()
    rng = random.Random(0)
    rate = _measure(manager, levels[0], [answer] * levels[0], prompt, rng)
    for level in levels:
        count = max(2 * level, int(rate * seconds / answer))
        lengths = [rng.randint(answer // 2, answer + answer // 2) for _ in range(count)]
        rate = _measure(manager, level, lengths, prompt, rng)
        print(json.dumps({"level": level, "rate": rate}), flush=True)
    manager.stop(block=True)


if __name__ == "__main__":
    main(
        sys.argv[1],
        [int(level) for level in sys.argv[2].split(",")],
        int(sys.argv[3]),
        int(sys.argv[4]),
        float(sys.argv[5]),
    )
