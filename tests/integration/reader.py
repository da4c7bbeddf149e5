"""A reader who types the commands of a page, and the reader's files."""

from __future__ import annotations

import glob
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.conftest import REPOSITORY, User, until
from tests.tools.make_tiny_gguf import tiny

BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MODEL = "llama3.2:3b"
"""The model named on the pages; here a random model of half a megabyte."""

# These follow a running job; all other commands wait until no job of the page is left.
_FOLLOWING = re.compile(r"aiflux (watch|status|logs|jobs|cancel|estimate|run .*--pilot)")

_GOOD_ENDS = {"COMPLETED", "CANCELLED"}
_ENDED = {*_GOOD_ENDS, "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def page_blocks(page: Path, *languages: str) -> list[str]:
    """Return a page's code blocks in these languages, without indentation."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        for indent, language, text in found
        if language in languages
    ]


def commands(block: str) -> Iterator[str]:
    """Yield the commands of a block: its lines without trailing comments."""
    for line in block.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s{2,}#.*$", "", line).strip()
        if command and not command.startswith("#"):
            yield command


@dataclass
class Reader:
    """A user in a directory like a checkout, with the files that pages mention.

    Attributes:
        place: current directory; contains the home directory.
        changes: texts of the pages that are replaced here.
        reported: failed jobs that were already reported.
    """

    user: User
    place: Path
    env: dict[str, str]
    changes: dict[str, str] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def types(self, command: str, code: int = 0, timeout: float = 420) -> str:
        """Run a command of a page; return its output."""
        if not _FOLLOWING.match(command):
            self.settle()
        command = self.here(command)
        path = f"{self.place / '.venv/bin'}:{self.user.environment()['PATH']}"
        env = {**self.env, "PATH": path, "HOME": str(self.place / "home")}
        return self.user.run(
            "bash", "-euo", "pipefail", "-c", command,
            cwd=self.place, env=env, code=code, timeout=timeout,
        )  # fmt: skip

    def here(self, text: str) -> str:
        """Return a text of a page as it applies here."""
        for there, other in self.changes.items():
            text = text.replace(there, other)
        return text

    def makes_way(self, given: Iterable[str]) -> None:
        """Remove files of an earlier block that these commands create again."""
        self.settle()
        for name in itertools.chain.from_iterable(map(made_by, given)):
            for path in self.place.glob(f"{glob.escape(name)}*"):
                remove(path)

    def runs_python(self, text: str) -> str:
        """Run a Python example of a page."""
        self.makes_way(text.splitlines())
        script = self.user.write(self.place / "example.py", self.here(text))
        env = {**self.env, "HOME": str(self.place / "home")}
        return self.user.run(self.place / ".venv/bin/python", script, cwd=self.place, env=env)

    def jobs(self) -> dict[str, str]:
        """Return the states of the jobs submitted from the reader's directory."""
        listed = self.user.run("squeue", "-h", "-a", "-t", "all", "-o", "%i|%T|%Z").splitlines()
        rows = [line.split("|", 2) for line in listed]
        return {job: state for job, state, at in rows if Path(at).is_relative_to(self.place)}

    def settle(self, timeout: float = 400) -> None:
        """Wait until all jobs have ended, and check that they succeeded."""

        def active() -> list[str]:
            return [job for job, state in self.jobs().items() if state not in _ENDED]

        def shown() -> str:
            jobs = [self.user.run("scontrol", "show", "job", job, code=None) for job in active()]
            return "\n".join(["the end of all jobs:", *jobs, self.logs()])

        until(lambda: not active(), shown, timeout, pause=0.2)
        bad = {job: state for job, state in self.jobs().items() if state not in _GOOD_ENDS}
        if new := bad.keys() - self.reported:
            self.reported |= new
            pytest.fail(f"jobs failed: {bad}\n{self.logs()}")

    def logs(self) -> str:
        """Return the end of the reader's job logs."""
        found = sorted(self.place.glob("**/slurm*.out"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text("utf-8") for path in found)[-6000:]


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
    yield from re.findall(r'output(?:_path)?="([^"]+)"', command)


def remove(path: Path) -> None:
    """Remove a file or a directory tree."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def furnish(user: User, checkout: Path, image: Path, place: Path) -> None:
    """Create the files that a reader has at the beginning."""
    for entry in checkout.iterdir():
        if not (place / entry.name).exists():
            (place / entry.name).symlink_to(entry)
    if not (place / "aiflux.sif").exists():
        (place / "aiflux.sif").symlink_to(image)
    (place / "home").mkdir()
    # Created on the pages on completion; the reference assumes that they exist.
    for folder in (".zfunc", ".config/fish/completions",
                   ".local/share/bash-completion/completions"):  # fmt: skip
        (place / "home" / folder).mkdir(parents=True)
    write_files(place)
    user.give(place)


def ask(custom_id: str, prompt: str, **more: object) -> str:
    """Return one request line."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **more}
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(entry) + "\n"


def write_files(place: Path) -> None:
    """Write all files that the pages assume to exist."""
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
        "review.j2": page_blocks(REPOSITORY / "docs/converters.md", "jinja")[0],
        "rated.csv": "text,rating\nI like it.,5\nIt broke.,1\n",
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
