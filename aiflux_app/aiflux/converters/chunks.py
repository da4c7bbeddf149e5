"""Long texts in pieces of about so many tokens, cut where a paragraph, line or word ends."""

from __future__ import annotations

from collections.abc import Iterator

from aiflux.errors import UsageError

# English text has about 4 bytes a token, code 3, CJK text 3 bytes a character and token.
BYTES_PER_TOKEN = 3
_ENDS = ("\n\n", "\n", ". ", "。", " ")


def check_chunks(tokens: int | None, overlap: int) -> None:
    """Raise UsageError unless chunks of ``tokens`` can overlap by ``overlap``."""
    if tokens is None and overlap:
        raise UsageError("--overlap needs --chunk-tokens", "--chunk-tokens 2000 --overlap 200")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--chunk-tokens {tokens} leaves nothing", "--chunk-tokens 2000")
    if tokens is not None and (not 0 <= overlap <= tokens // 2):
        raise UsageError(
            f"chunks of {tokens} tokens cannot overlap by {overlap}",
            "--overlap is at most half of --chunk-tokens",
        )


def split_text(text: str, tokens: int, overlap: int = 0) -> Iterator[str]:
    """Yield pieces of at most ``tokens`` tokens; each begins ``overlap`` before the last one's end.

    A token is counted as three bytes of UTF-8, which errs on the side of smaller pieces.
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
    """Return the end of the longest piece that has at most ``size`` bytes (and one character)."""
    piece = text[start : start + size]
    if not piece.isascii():
        piece = piece.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
    return start + max(1, len(piece))


def _good_end(text: str, start: int, longest: int) -> int:
    """Return where to cut: behind the largest unit that ends in the piece's second half."""
    for end in _ENDS:
        found = text.rfind(end, start + (longest - start) // 2, longest)
        if found >= 0:
            return found + len(end)
    return longest


def _good_start(text: str, end: int, overlap: int) -> int:
    """Return where the next piece begins: at a word, about ``overlap`` tokens before ``end``."""
    if not overlap:
        return end
    back = _last(text[max(0, end - overlap * BYTES_PER_TOKEN) : end], overlap * BYTES_PER_TOKEN)
    start = end - back
    word = text.find(" ", start, start + back // 2)
    return word + 1 if word >= 0 else start


def _last(text: str, size: int) -> int:
    """Return how many of a text's last characters have at most ``size`` bytes together."""
    if text.isascii():
        return len(text)
    return len(text.encode("utf-8", "replace")[-size:].decode("utf-8", "ignore"))
