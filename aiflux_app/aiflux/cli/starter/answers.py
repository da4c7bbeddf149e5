"""Make requests of the lines of a text file (FILE.txt), or print the answers in FILE.json."""

import json
import sys
from pathlib import Path


def requests(path: Path) -> None:
    """Print one request for each line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            body = {"messages": [{"role": "user", "content": line}], "max_tokens": 200}
            request = {
                "custom_id": f"{path.stem}-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            print(json.dumps(request, ensure_ascii=False))


def answers(path: Path) -> None:
    """Print id and answer of each result, separated by a tab."""
    for entry in json.loads(path.read_text(encoding="utf-8")):
        name = entry["input"]["custom_id"]
        if entry["output"] is None:
            print(name, "FAILED: " + entry["error"]["message"], sep="\t")
        else:
            text = entry["output"]["choices"][0]["message"]["content"] or "(empty)"
            print(name, " ".join(text.split()), sep="\t")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    file = Path(sys.argv[1])
    (answers if file.suffix == ".json" else requests)(file)
