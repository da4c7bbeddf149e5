"""Read the tables with pandas. Run: python read_back.py > tables_read_back.json."""

import json
from pathlib import Path

import pandas as pd

SEPARATORS = {
    "semicolon.csv": ";", "write2.csv": ";", ".tsv": "\t", "table_double.txt": " ",
    "table_one.txt": " ", ".csv": ",",
}  # fmt: skip
read = {}
here = Path(__file__).parent
for path in sorted((*here.glob("*/*.csv"), *here.glob("*/*.tsv"), *here.glob("*/*.txt"))):
    separator = next((mark for end, mark in SEPARATORS.items() if path.name.endswith(end)), None)
    if separator is None:
        continue
    latin = path.stem in ("latin1", "windows")
    frame = pd.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False,
        encoding="cp1252" if latin else "utf-8-sig",
    )  # fmt: skip
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names="row.names")
    read[f"{path.parent.name}/{path.name}"] = [list(frame.columns), *frame.values.tolist()]
print(json.dumps(read, ensure_ascii=False))
