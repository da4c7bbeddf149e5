"""What is said of a pull that failed."""

from __future__ import annotations

from pathlib import Path

from aiflux.engines.ollama.pull import with_reason

LOG = r"""time=2026-11-25T20:48:52.5Z level=INFO source=download.go:177 msg="downloading ef96"
time=2026-11-25T20:48:52.6Z level=WARN source=download.go:256 msg="backing off" err="reset"
time=2026-11-25T20:48:52.6Z level=WARN source=download.go:256 msg="backing off" err="500: {\"m\"}"
"""


def test_a_time_limit_is_told_with_what_took_so_long(tmp_path: Path) -> None:
    log = tmp_path / "pull.log"
    log.write_text(LOG, encoding="utf-8")
    words = "context deadline exceeded"
    assert with_reason(words, log) == f'{words} (what was tried last gave: 500: {{"m"}})'
    assert with_reason("no such host", log) == "no such host"
    log.write_text("", encoding="utf-8")
    assert with_reason(words, log) == words
