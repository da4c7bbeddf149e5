"""What a file is by its first bytes, where a table or JSON was wanted and it is neither."""

from __future__ import annotations

from pathlib import Path

from aiflux.converters.writer import reading
from aiflux.errors import InputError

_BLOCK = 1 << 16
_ZIP = "save the workbook as CSV, or unpack the archive; `aiflux convert dir` reads DOCX"
_PIPE = "unpack it, or pipe it: {} FILE | aiflux convert ... --input -"
_KINDS = (
    (b"\x1f\x8b", "compressed by gzip", _PIPE.format("zcat")),
    (b"BZh", "compressed by bzip2", _PIPE.format("bzcat")),
    (b"\xfd7zXZ", "compressed by xz", _PIPE.format("xzcat")),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _PIPE.format("zstdcat")),
    (b"PK\x03\x04", "a ZIP file: an Excel workbook, a DOCX file or an archive", _ZIP),
    (b"\xd0\xcf\x11\xe0", "an Excel or Word file of the old kind", "save it as CSV"),
    (b"PAR1", "a Parquet file", "`aiflux convert parquet` reads it"),
    (b"%PDF-", "a PDF file", "`aiflux convert dir` reads PDF files of a folder"),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV"),
)


def checked_start(path: Path, wanted: str) -> bytes:
    """Return the first bytes of a file that may be what is wanted, such as ``CSV``.

    Raises:
        InputError: it cannot be read, is empty, or begins as one of the kinds that are mistaken.
    """
    with reading(path):
        if path.is_dir():
            raise InputError(
                f"the input {str(path)!r} is a directory", "`aiflux convert dir` reads directories"
            )
        with open(path, "rb") as file:
            start = file.read(_BLOCK)
    if not start:
        raise InputError(f"the input {str(path)!r} is empty", "check the path")
    for mark, kind, remedy in _KINDS:
        if start.startswith(mark):
            raise InputError(f"the input {str(path)!r} is not {wanted}: it is {kind}", remedy)
    return start
