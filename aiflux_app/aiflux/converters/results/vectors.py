"""Write embeddings as a NumPy array: one row of 32-bit floats for each row of the table."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from typing import IO, Any

from aiflux.converters.results.table import BackTable, Record
from aiflux.errors import InputError
from aiflux.util.text import counted

# Version 1.0 of the format: the header's length makes the data begin at a multiple of 64 bytes.
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = 128


def write_npy(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write a file for ``numpy.load``; a row without an answer has NaN in it.

    Raises:
        InputError: the answers are no embeddings, or of different sizes.
    """
    size = table.dimension
    if size is None:
        raise InputError(
            f"{table.output} has no embeddings", "use another form, such as `aiflux results to-csv`"
        )
    file.write(bytes(_HEADER))  # the number of rows is known at the end
    missing, rows = array("f", [math.nan]) * size, 0
    for rows, record in enumerate(records, start=1):
        text = record[table.answer]
        vector = missing if text is None else _numbers(text, size, rows)
        if array("H", [1]).tobytes() == b"\0\1":  # a big-endian machine
            vector = array("f", vector)
            vector.byteswap()
        file.write(vector.tobytes())
    file.seek(0)
    file.write(_header(rows, size))


def _numbers(text: str, size: int, row: int) -> array[float]:
    found: Any = json.loads(text or "null")
    if not isinstance(found, list) or len(found) != size:
        count = counted(len(found), "number") if isinstance(found, list) else "no numbers"
        raise InputError(
            f"the answer of row {row} has {count}, and the first {size}",
            "all embeddings must be of one model",
        )
    try:
        if bool not in map(type, found):
            return array("f", found)
    except (TypeError, OverflowError):
        pass
    raise InputError(
        f"the answer of row {row} is no list of numbers",
        "use another form, such as `aiflux results to-jsonl`",
    )


def _header(rows: int, size: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {size}), }}"
    length = _HEADER - len(_MAGIC) - 2
    padded = text.ljust(length - 1) + "\n"
    return _MAGIC + length.to_bytes(2, "little") + padded.encode("ascii")
