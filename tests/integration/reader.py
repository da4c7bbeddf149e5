"""Somebody who reads a page and types its commands, and the files that he has."""

from __future__ import annotations

import glob
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.conftest import REPOSITORY, User
from tests.tools.make_tiny_gguf import tiny

BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MODEL = "llama3.2:3b"
"""The model of the pages. Here it is a random one of half a megabyte: words do not matter."""

# These follow a run that is going; every other command waits until no job of the page is left.
_FOLLOWING = re.compile(r"aiflux (watch|status|logs|jobs|cancel|estimate|run .*--pilot)")

_GOOD_ENDS = {"COMPLETED", "CANCELLED"}
_ENDED = {*_GOOD_ENDS, "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def page_blocks(page: Path, *languages: str) -> list[str]:
    """Return the blocks of a page in these languages, without their indentation."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        for indent, language, text in found
        if language in languages
    ]


def commands(block: str) -> Iterator[str]:
    """Yield the commands of a block: its lines, without comments at their ends."""
    for line in block.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s{2,}#.*$", "", line).strip()
        if command and not command.startswith("#"):
            yield command


@dataclass
class Reader:
    """A user in a folder that looks like a checkout, with the files that pages speak of.

    Attributes:
        place: his current folder; his home lies in it.
        changes: texts of the pages for which something else has to be typed here.
        told: jobs that ended badly, and of which that was said.
    """

    user: User
    place: Path
    env: dict[str, str]
    changes: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def types(self, command: str, code: int = 0, timeout: float = 420) -> str:
        """Run a command of a page; return what it prints."""
        if not _FOLLOWING.match(command):
            self.settle()
        for text, other in self.changes.items():
            command = command.replace(text, other)
        path = f"{self.place / '.venv/bin'}:{self.user.environment()['PATH']}"
        env = {**self.env, "PATH": path, "HOME": str(self.place / "home")}
        return self.user.run(
            "bash", "-euo", "pipefail", "-c", command,
            cwd=self.place, env=env, code=code, timeout=timeout,
        )  # fmt: skip

    def makes_way(self, given: Iterable[str]) -> None:
        """Remove what an earlier block of the page made and these commands will make again."""
        self.settle()
        for name in itertools.chain.from_iterable(map(made_by, given)):
            for path in self.place.glob(f"{glob.escape(name)}*"):
                remove(path)

    def runs_python(self, text: str) -> str:
        """Run a Python example of a page."""
        self.makes_way(text.splitlines())
        script = self.user.write(self.place / "example.py", text)
        env = {**self.env, "HOME": str(self.place / "home")}
        return self.user.run(self.place / ".venv/bin/python", script, cwd=self.place, env=env)

    def jobs(self) -> dict[str, str]:
        """Return the states of the jobs that were submitted in his folder."""
        told = self.user.run("squeue", "-h", "-a", "-t", "all", "-o", "%i|%T|%Z").splitlines()
        rows = [line.split("|", 2) for line in told]
        return {job: state for job, state, at in rows if Path(at).is_relative_to(self.place)}

    def settle(self, timeout: float = 400) -> None:
        """Wait until no job of his goes on, and see that each has ended well."""
        deadline = time.monotonic() + timeout
        while active := {job for job, state in self.jobs().items() if state not in _ENDED}:
            if time.monotonic() > deadline:
                pytest.fail(f"jobs {active} have not ended after {timeout} s")
            time.sleep(0.5)
        bad = {job: state for job, state in self.jobs().items() if state not in _GOOD_ENDS}
        if new := bad.keys() - self.told:
            self.told |= new
            logs = [path.read_text("utf-8") for path in self.place.glob("**/slurm*.out")]
            pytest.fail(f"jobs ended badly: {bad}\n" + "\n".join(logs)[-6000:])


def made_by(command: str) -> Iterator[str]:
    """Yield the names of the files that a command writes."""
    words = command.split()
    for option, value in itertools.pairwise(words):
        if option in ("--output", "-o", ">") and value != "-":
            yield value
    if words[:2] == ["aiflux", "results"] and words[2].startswith("to-"):
        yield f"{Path(words[3]).stem}.{words[2].removeprefix('to-')}"
    if words[:3] == ["aiflux", "models", "export"]:
        yield words[-1]
    if words[:3] == ["aiflux", "config", "init"]:
        yield "aiflux.yaml"
    if "output.json" in words:
        yield "output.json"
    yield from re.findall(r'output_path="([^"]+)"', command)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def furnish(user: User, checkout: Path, image: Path, place: Path) -> None:
    """Put into a folder what a reader of the pages has before he begins."""
    for entry in checkout.iterdir():
        if not (place / entry.name).exists():
            (place / entry.name).symlink_to(entry)
    if not (place / "aiflux.sif").exists():
        (place / "aiflux.sif").symlink_to(image)
    (place / "home").mkdir()
    # The pages on completion make these; the reference takes them for granted.
    for folder in (".zfunc", ".config/fish/completions",
                   ".local/share/bash-completion/completions"):  # fmt: skip
        (place / "home" / folder).mkdir(parents=True)
    write_files(place)
    user.give(place)


def ask(custom_id: str, prompt: str, **more: object) -> str:
    """One request, as a line."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **more}
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(entry) + "\n"


def write_files(place: Path) -> None:
    """Write every file that a page takes for granted."""
    request = page_blocks(REPOSITORY / "README.md", "json")[0]
    old_models = page_blocks(REPOSITORY / "docs/configuration.md", "")
    rows = [("a1", "Works well, and looks good.", "good"), ("a2", "Broke on day one.", "bad")]
    table = [("id", "text", "label"), *rows]
    texts = {
        "prompts.jsonl": "".join(ask(f"r{n}", f"Say {n}.") for n in range(1, 5)),
        "input.jsonl": request,
        "reviews.csv": "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in table),
        "reviews.tsv": "".join("\t".join(row) + "\n" for row in table),
        "prompt.txt": "Summarize in one sentence: {text}\n",
        "questions.json": json.dumps(
            [{"id": "q1", "question": "Who was it?", "meta": {"source": "a letter"}}]
        ),
        "chats.jsonl": json.dumps({"messages": [{"role": "user", "content": "Hello."}]}) + "\n",
        "rating.json": json.dumps(
            {
                "type": "object",
                "properties": {"label": {"enum": ["good", "bad"]}, "score": {"enum": [1, 2, 3]}},
                "required": ["label", "score"],
                "additionalProperties": False,
            }
        ),
        "template.txt": "Q: {{ .Prompt }} A:",
        "passphrase": "\n",
        "papers/notes.md": "# Notes\n\nA text of a few words.\n",
        "papers/drafts/old.md": "Not this one.\n",
        "models/llama3.2/3b.yaml": next(text for text in old_models if text.startswith("name: ")),
    }
    texts |= {"in.csv": texts["reviews.csv"], "in.json": texts["questions.json"]}
    for name, text in texts.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _write_binary_files(place, table)


def _write_binary_files(place: Path, table: list[tuple[str, ...]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    columns = list(zip(*table[1:], strict=True))
    pq.write_table(pa.table(dict(zip(table[0], columns, strict=True))), place / "reviews.parquet")
    (place / "in.parquet").write_bytes((place / "reviews.parquet").read_bytes())
    (place / "mine.gguf").write_bytes(tiny())
    (place / "photos").mkdir()
    Image.new("RGB", (1200, 900), "teal").save(place / "photos" / "sea.png")
