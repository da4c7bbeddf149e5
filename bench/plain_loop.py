"""The simplest possible client, one request after another: INPUT OUTPUT URL."""

import json
import sys
from pathlib import Path

import requests


def main(source: str, output: str, url: str) -> None:
    """Send every request of a file and write the answers."""
    answers = []
    with open(source, encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            response = requests.post(url + entry["url"], json=entry["body"], timeout=600)
            response.raise_for_status()
            answers.append({"input": entry, "output": response.json()})
    Path(output).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
