"""``python3 nearest.py OUTPUT.json``: print the nearest neighbour of each embedded text."""

from __future__ import annotations

import json
import math
import sys


def main(path: str) -> None:
    """Print a line for each text. Suitable for a few 10,000 texts: all are kept in memory."""
    with open(path, encoding="utf-8") as file:
        entries = [entry for entry in json.load(file) if entry["output"] is not None]
    texts = [entry["input"]["body"]["input"] for entry in entries]
    vectors = [_unit(entry["output"]["data"][0]["embedding"]) for entry in entries]
    for at, text in enumerate(texts):
        others = [n for n in range(len(texts)) if n != at]
        best = max(others, key=lambda n: _product(vectors[at], vectors[n]))
        print(f"{_product(vectors[at], vectors[best]):.2f}  {text} ~ {texts[best]}")


def _unit(vector: list[float]) -> list[float]:
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def _product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main(sys.argv[1])
