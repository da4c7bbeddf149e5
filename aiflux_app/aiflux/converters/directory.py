"""Select the files of a directory and convert them to requests, one per file or per chunk."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.cells import BadRowError
from aiflux.converters.documents import NoTextError, read_document
from aiflux.converters.encoding import Encoding, checked_encoding
from aiflux.converters.pdf_pages import IMAGES, TEXT, page_images
from aiflux.converters.prompt import Prompt, prompt_and_form
from aiflux.converters.request_form import (
    RequestDraft,
    RequestForm,
    make_form,
    with_image,
)
from aiflux.converters.table import names
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import (
    Conversion,
    Progress,
    Skipped,
    Summary,
    reading,
    skipped_path,
)
from aiflux.errors import AifluxError, InputError, UsageError
from aiflux.util.lines import unreadable
from aiflux.util.text import counted

# Word and Excel create ~$ lock files next to open documents.
_HIDDEN = (".", "~$")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Found:
    """A file: its path, its path relative to the directory, and why it is skipped, if so."""

    path: Path
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Walk:
    """Selects files of a directory.

    Shell patterns (``*.md``, ``drafts/*``) are matched against a file's name and its path relative
    to the directory. Hidden files and directories are skipped. Links to files are followed, links
    to directories are not.
    """

    folder: Path
    recursive: bool = False
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: int | None = None

    def files(self) -> Iterator[Found]:
        """Yield the selected files.

        Raises:
            InputError: the directory cannot be read.
        """
        if not os.path.isdir(self.folder):  # unlike Path.is_dir, it never raises
            raise self._no_folder()
        yield from self._below(self.folder, "")

    def _no_folder(self) -> AifluxError:
        try:
            os.stat(self.folder)
        except FileNotFoundError:
            return InputError(f"the input {str(self.folder)!r} does not exist", "check the path")
        except OSError as error:
            return unreadable(self.folder, error)
        return InputError(
            f"the input {str(self.folder)!r} is not a directory",
            f"use its parent directory, with --pattern {self.folder.name!r}",
        )

    def nothing(self) -> str:
        """Return the remedy if no file was found."""
        if self.patterns or self.exclude:
            remedy = "check --pattern and --exclude"
        else:
            remedy = "check its content; hidden files are skipped"
        return remedy if self.recursive else f"{remedy}; use --recursive to include subdirectories"

    def count(self) -> int:
        """Return the number of files without reading them."""
        return sum(1 for _ in self.files())

    def _below(self, folder: Path, prefix: str) -> Iterator[Found]:
        if prefix:
            try:
                names = sorted(os.listdir(folder))
            except OSError as error:
                yield Found(folder, prefix, f"cannot be read: {error.strerror}")
                return
        else:
            with reading(folder):
                names = sorted(os.listdir(folder))
        for name in names:
            path, inner = folder / name, prefix + name
            if name.startswith(_HIDDEN) or _matches(inner, self.exclude):
                continue
            if os.path.isdir(path):
                if self.recursive and path.is_symlink():
                    yield Found(path, inner + "/", "links to directories are not followed")
                elif self.recursive:
                    yield from self._below(path, inner + "/")
            elif not self.patterns or _matches(inner, self.patterns):
                yield Found(path, inner, self._objection(path))

    def _objection(self, path: Path) -> str:
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not path.is_file():
            return "not a regular file"
        if size == 0:
            return "empty"
        if self.max_size is not None and size > self.max_size:
            return f"{_size(size)} exceeds --max-file-size {_size(self.max_size)}"
        return ""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, each) or fnmatchcase(last, each) for each in patterns)


def parse_size(text: str) -> int:
    """Convert a size such as ``10M`` or ``500K`` to bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip().upper().replace("IB", "B"))
    if match is None:
        raise UsageError(f"{text!r} is not a size", "use for example 500K, 10M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _size(size: int) -> str:
    for unit in ("G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}".removesuffix(".0") + unit
    return counted(size, "byte")


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

MAX_FILE_SIZE = 20 << 20
_NAMED = 5
NAMES = ("text", "source_file", "chunk", "chunks")


def directory_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate = "{text}",
    recursive: bool = False,
    patterns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_file_size: int = MAX_FILE_SIZE,
    chunk_tokens: int | None = None,
    overlap: int = 0,
    encoding: str | None = None,
    pdf_pages: str = TEXT,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each text or document of a directory, or each chunk of it, to a request.

    ``custom_id`` is the file's path inside the directory, followed by ``#1``, ``#2``, ... for
    chunks. The metadata has ``source_file`` and, for chunks, ``chunk`` (from 1) and ``chunks``.
    Binary, empty and too large files are skipped; damaged documents are errors.

    Args:
        template: ``{text}``, ``{source_file}``, ``{chunk}`` and ``{chunks}`` are replaced; or the
            ``Path`` of a template.
        recursive: include subdirectories. Hidden files and directories are always skipped.
        patterns, exclude: shell patterns, matched against file name and relative path.
        max_file_size: in bytes; larger files are skipped.
        chunk_tokens: split longer texts into chunks of about this number of tokens.
        overlap: number of tokens that a chunk repeats from the previous one.
        encoding: encoding of plain text that is not UTF-8; by default it is read from the file or
            guessed, and reported in the summary.
        pdf_pages: ``text``, or ``images`` to send each page of a PDF as an image. Its number is
            ``{chunk}``.
        progress: called with the number of files done and the total.

    The other arguments are the same as for ``csv_to_jsonl``.

    Raises:
        ConfigError: the library for PDF or DOCX files is not installed.
        InputError: the directory or some files are invalid, or no file remains.
        StorageError: the output cannot be written.
    """
    check_chunks(chunk_tokens, overlap)
    # A page can be asked the same as all others.
    required = pdf_pages != IMAGES
    prompt, form = prompt_and_form(template, make_form(**request), required=required)
    _check_pages(pdf_pages, template, form)
    prompt.check(NAMES, "a file", "name")
    folder = Path(input_path)
    walk = Walk(folder, recursive, names(patterns), names(exclude), max_file_size)
    output = None if output_path is None else Path(output_path)
    known = None if encoding is None else checked_encoding(encoding).name
    maker = _FileRequests(walk, prompt, chunk_tokens, overlap, known, output, progress, pdf_pages)
    job = Conversion(
        folder,
        output,
        form,
        unit="file",
        place="file",
        skip_bad=skip_bad,
        limit=limit,
        notes=maker.notes,
        nothing=walk.nothing,
    )
    return job.run(maker.items())


@dataclass(frozen=True)
class _FileRequests:
    """Creates the requests for each file."""

    walk: Walk
    prompt: Prompt
    chunk_tokens: int | None
    overlap: int
    encoding: str | None
    output: Path | None
    progress: Progress | None
    pdf_pages: str = TEXT
    assumed: dict[Encoding, list[str]] = field(default_factory=lambda: defaultdict(list))
    blank: dict[str, int] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """Return which files were not UTF-8, by encoding, and which have pages without text."""
        encodings = map(_assumption, self.assumed, self.assumed.values())
        blank = [_blank_pages(self.blank)] if self.blank else []
        return (*encodings, *blank, *self.prompt.literal_notes(NAMES))

    def items(self) -> Iterator[RequestDraft | Skipped]:
        total = self.walk.count() if self.progress is not None else 0
        own = self._own()
        for number, found in enumerate(self.walk.files(), start=1):
            if os.path.realpath(found.path) not in own:
                yield from self._of_file(number, found)
            if self.progress is not None:
                self.progress(number, total)

    def _own(self) -> set[str]:
        """Return the files that this or an earlier conversion writes."""
        if self.output is None:
            return set()
        return {os.path.realpath(each) for each in (self.output, skipped_path(self.output))}

    def _of_file(self, number: int, found: Found) -> Iterator[RequestDraft | Skipped]:
        if found.reason:
            yield Skipped(number, found.name, found.reason, bad=False)
            return
        if self.pdf_pages == IMAGES and found.path.suffix.lower() == ".pdf":
            yield from self._pages(number, found)
            return
        try:
            document = read_document(found.path, self.encoding, self.walk.max_size)
        except (NoTextError, BadRowError) as error:
            yield Skipped(number, found.name, str(error), bad=isinstance(error, BadRowError))
            return
        text, encoding = document.text, document.encoding
        if document.blank:
            self.blank[found.name] = document.blank
        if encoding is not None and encoding.origin != "detected":
            self.assumed[encoding].append(found.name)
        chunks = [text]
        if self.chunk_tokens is not None:
            chunks = list(split_text(text, self.chunk_tokens, self.overlap))
        try:
            drafts = [
                self._draft(number, found.name, chunk, part, len(chunks))
                for part, chunk in enumerate(chunks)
            ]
        except BadRowError as error:
            yield Skipped(number, found.name, str(error))
            return
        yield from drafts

    def _pages(self, number: int, found: Found) -> Iterator[RequestDraft | Skipped]:
        try:
            for part, (pages, url) in enumerate(page_images(found.path)):
                draft = self._draft(number, found.name, "", part, pages)
                parts = with_image(draft.content, url)
                where = {"page": part + 1, "pages": pages}
                yield replace(draft, content=parts, metadata={**draft.metadata, **where})
        except BadRowError as error:
            yield Skipped(number, found.name, str(error))

    def _draft(self, number: int, name: str, text: str, part: int, parts: int) -> RequestDraft:
        source = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        values = {"text": text, "source_file": source, "chunk": part + 1, "chunks": parts}
        metadata: dict[str, object] = {"source_file": source}
        if self.chunk_tokens is not None:
            metadata |= {"chunk": part + 1, "chunks": parts}
        name = source if parts == 1 else f"{source}#{part + 1}"
        return self.prompt.draft(number, name, values, metadata, part)


def _check_pages(pdf_pages: str, template: Any, form: RequestForm) -> None:
    if pdf_pages not in (TEXT, IMAGES):
        raise UsageError(f"--pdf-pages {pdf_pages} is unknown", f"use {TEXT} or {IMAGES}")
    if pdf_pages == IMAGES and template == "{text}":
        raise UsageError(
            "--pdf-pages images needs a template that says what to do with a page",
            '--template "Transcribe this page."',
        )
    if pdf_pages == IMAGES and form.endpoint != "chat":
        raise UsageError("--pdf-pages images requires the chat endpoint", "remove --endpoint")
    if pdf_pages == IMAGES and form.shots:
        raise UsageError("--examples have no images for --pdf-pages images", "remove one of them")


def _blank_pages(files: Mapping[str, int]) -> str:
    """Describe the PDF files with pages without text."""
    shown = [f"{name!r} ({pages})" for name, pages in list(files.items())[:_NAMED]]
    named = ", ".join(shown) + (", ..." if len(files) > _NAMED else "")
    pages = sum(files.values())
    found = counted(pages, "page")
    return f"{found} without text, which may be scanned, in {named}: --pdf-pages images"


def _assumption(encoding: Encoding, files: list[str]) -> str:
    """Describe the encoding assumed for some files, with the first file names."""
    named = ", ".join(map(repr, files[:_NAMED])) + (", ..." if len(files) > _NAMED else "")
    count = f"{len(files)} file" + ("" if len(files) == 1 else "s")
    note = f"{encoding.name} ({encoding.origin}): {count}, {named}"
    if encoding.origin == "guessed":
        note += "; if this is wrong, set --encoding"
    return note


# English text has about 4 bytes per token and code 3; CJK text has 3 bytes per character, which
# is about one token.
BYTES_PER_TOKEN = 3
_ENDS = ("\n\n", "\n", ". ", "。", " ")


def check_chunks(tokens: int | None, overlap: int) -> None:
    """Raise UsageError if chunks of ``tokens`` cannot overlap by ``overlap``."""
    if tokens is None and overlap:
        raise UsageError("--overlap needs --chunk-tokens", "--chunk-tokens 2000 --overlap 200")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--chunk-tokens {tokens} is not 1 or more", "--chunk-tokens 2000")
    if tokens is not None and (not 0 <= overlap <= tokens // 2):
        raise UsageError(
            f"chunks of {tokens} tokens cannot overlap by {overlap}",
            "set --overlap to at most half of --chunk-tokens",
        )


def split_text(text: str, tokens: int, overlap: int = 0) -> Iterator[str]:
    """Yield chunks of at most ``tokens`` tokens, each starting ``overlap`` before the last end.

    A token is counted as three bytes of UTF-8, so chunks tend to be smaller than the limit.
    """
    start = 0
    while True:
        longest = _fitting(text, start, tokens * BYTES_PER_TOKEN)
        if longest == len(text):
            yield text[start:]
            return
        end = _good_end(text, start, longest)
        yield text[start:end]
        start = max(start + 1, _good_start(text, end, overlap))


def _fitting(text: str, start: int, size: int) -> int:
    """Return the end of the longest chunk with at most ``size`` bytes, but at least one char."""
    piece = text[start : start + size]
    if not piece.isascii():
        piece = piece.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
    return start + max(1, len(piece))


def _good_end(text: str, start: int, longest: int) -> int:
    """Return where to split: after the largest unit that ends in the chunk's second half."""
    for end in _ENDS:
        found = text.rfind(end, start + (longest - start) // 2, longest)
        if found >= 0:
            return found + len(end)
    return longest


def _good_start(text: str, end: int, overlap: int) -> int:
    """Return the next chunk's start: a word about ``overlap`` tokens before ``end``."""
    if not overlap:
        return end
    back = _last(text[max(0, end - overlap * BYTES_PER_TOKEN) : end], overlap * BYTES_PER_TOKEN)
    start = end - back
    word = text.find(" ", start, start + back // 2)
    return word + 1 if word >= 0 else start


def _last(text: str, size: int) -> int:
    """Return how many characters at the end of a text fit into ``size`` bytes."""
    if text.isascii():
        return len(text)
    return len(text.encode("utf-8", "replace")[-size:].decode("utf-8", "ignore"))
