"""Which custom_ids were used already, in 16 bytes a slot: a table of hashes and places."""

from __future__ import annotations

from array import array

_FIRST_SIZE = 1 << 12


class SeenIds:
    """An open-addressing table from a name's 64-bit hash to the number it was first used at.

    Names themselves are not kept: of ten million names, two different ones are taken for the same
    with a probability of about three in a million.
    """

    def __init__(self) -> None:
        self._used = 0
        self._hashes, self._numbers = _table(_FIRST_SIZE)

    def first_use(self, name: str, number: int) -> int | None:
        """Return the number that ``name`` was used at before; else note it and return None."""
        key = hash(name) or 1
        slot = self._slot(key)
        if self._hashes[slot]:
            return self._numbers[slot]
        self._hashes[slot], self._numbers[slot] = key, number
        self._used += 1
        if 2 * self._used > len(self._hashes):
            self._grow()
        return None

    def _slot(self, key: int) -> int:
        """Return the slot that holds a hash, or the free one where it belongs."""
        mask = len(self._hashes) - 1
        slot = key & mask
        while self._hashes[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._hashes, self._numbers = _table(2 * len(hashes))
        for key, number in zip(hashes, numbers, strict=True):
            if key:
                slot = self._slot(key)
                self._hashes[slot], self._numbers[slot] = key, number


def _table(size: int) -> tuple[array[int], array[int]]:
    empty = bytes(8 * size)
    return array("q", empty), array("q", empty)
