"""Make the pandas files. Run with the output directory as argument."""

import datetime as dt
import decimal
import sys
from pathlib import Path

import numpy as np
import pandas as pd

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
frame = pd.DataFrame(
    {
        "text": ['He said "hi", and left', "two\nlines; ümlaut €", "", None, "tab\there | pipe\\"],
        "when": pd.to_datetime(
            ["2026-01-02 03:04:05", None, "1999-12-31", "2026-06-07 08:09:10.123456789", None],
            format="mixed",
        ),
        "score": [1.5, float("nan"), 1e10, float("inf"), -0.25],
        "count": pd.array([1, None, 2**53 + 1, 0, -5], dtype="Int64"),
        "done": pd.array([True, None, False, True, False], dtype="boolean"),
        "label": pd.Categorical(["a", "b", None, "a", "c"], categories=["c", "b", "a"]),
    }
)
frame.to_csv(folder / "index.csv")
frame.to_csv(folder / "plain.csv", index=False)
frame.to_csv(folder / "semicolon.csv", index=False, sep=";", decimal=",", encoding="utf-8-sig")
frame.to_csv(folder / "tab.tsv", index=False, sep="\t", na_rep="NaN", lineterminator="\r\n")
frame.to_json(folder / "records.json", orient="records", date_format="iso")
frame.to_json(folder / "lines.jsonl", orient="records", lines=True, date_format="iso")

more = frame.assign(
    zoned=frame["when"].dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin"),
    took=pd.to_timedelta([90, None, 0, 86401, 1], unit="s"),
    price=[decimal.Decimal("1.10"), None, decimal.Decimal("-0.01"), decimal.Decimal("99.00"), None],
    day=[dt.date(2026, 1, 2), None, dt.date(1999, 12, 31), None, None],
    tags=[["x", "y"], [], None, ["z"], ["x"]],
    large=np.array([2**63, 0, 2**64 - 1, 1, 2], dtype="uint64"),
    small=pd.array([0.1, 0.2, 0.3, float("nan"), 5], dtype="float32"),
    raw=[b"bytes", b"\xff\x00", None, b"", b"x"],
)
more.to_parquet(folder / "types.parquet")
frame.set_index("label").to_parquet(folder / "index.parquet")
frame[frame["score"] > 0].to_parquet(folder / "filtered.parquet")

sheet = frame[["text", "score", "count", "done", "when"]]
sheet.to_excel(folder / "sheet.xlsx", index=False, sheet_name="answers")
sheet.to_excel(folder / "sheet.ods", index=False, sheet_name="answers", engine="odf")
