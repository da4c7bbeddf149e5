"""What Word shows in a DOCX that is not text in it: list numbers, and symbols of symbol fonts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aiflux.util.text import REPLACEMENT

_OFF = ("0", "false", "off")
_BULLET = "\u2022"
_LEVELS = 9
_LONGEST_LABEL = 100  # a hostile file could repeat a long one in every paragraph
_ROMAN = (
    (1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"),
    (40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"),
)  # fmt: skip
# Adobe's Symbol encoding, from 0x20 and from 0xA0.
_SYMBOL_LOW = (
    " !∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟ"
    "ΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
)
_SYMBOL_HIGH = (
    "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉"
    "∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪�〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭"
)
_SYMBOL = {
    **dict(enumerate(_SYMBOL_LOW, 0x20)),
    **dict(enumerate(_SYMBOL_HIGH, 0xA0)),
}
# The usual marks of Wingdings.
_WINGDINGS = {
    0x4A: "\u263a", 0x4C: "\u2639", 0x6C: "\u25cf", 0x6E: "\u25a0", 0x6F: "\u25a1",
    0x71: "\u2751", 0x75: "\u25c6", 0x76: "\u2756", 0x9F: "\u2022", 0xA7: "\u25aa",
    0xA8: "\u25fb", 0xD8: "\u27a2", 0xDF: "\u2190", 0xE0: "\u2192", 0xE1: "\u2191",
    0xE2: "\u2193", 0xE8: "\u2794", 0xF0: "\u21e8", 0xFB: "\u2717", 0xFC: "\u2713",
    0xFD: "\u2612", 0xFE: "\u2611",
}  # fmt: skip
_FONTS: Mapping[str, Mapping[int, str]] = {"symbol": _SYMBOL, "wingdings": _WINGDINGS}


def symbol(code: int, font: str) -> str:
    """Return the character that a font shows for a code; U+FFFD if it is not known.

    Symbol fonts have their characters from U+F000 on, where Unicode has none.
    """
    table = _FONTS.get(font.strip().lower())
    if table is not None and (code < 0x100 or code >> 8 == 0xF0):
        return table.get(code & 0xFF, REPLACEMENT)
    if 0xD800 <= code <= 0xF8FF or not 0 < code < 0x110000:
        return REPLACEMENT
    return chr(code)


@dataclass
class _Level:
    start: int = 1
    form: str = "decimal"
    text: str = ""
    gap: str = " "
    style: str = ""
    legal: bool = False
    font: str = ""

    def set(self, name: str, values: Mapping[str, str]) -> None:
        """Read an element inside of a level."""
        value = values.get("val", "")
        if name == "start":
            self.start = whole(value)
        elif name == "numFmt":
            self.form = value
        elif name == "lvlText":
            self.text = value[:_LONGEST_LABEL]
        elif name == "suff":
            self.gap = "" if value == "nothing" else " "
        elif name == "pStyle":
            self.style = value
        elif name == "isLgl":
            self.legal = is_on(values)
        elif name == "rFonts":
            self.font = values.get("ascii", values.get("hAnsi", ""))


@dataclass
class _List:
    """A definition of lists; several lists can share one and continue each other's numbers."""

    levels: dict[int, _Level] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    style: str = ""


@dataclass
class _Style:
    based_on: str = ""
    number: str | None = None
    level: int | None = None


class Numbering:
    """The lists of a document: reads ``numbering.xml`` and ``styles.xml``, and counts."""

    def __init__(self) -> None:
        self._lists: dict[str, _List] = {}
        self._numbers: dict[str, str] = {}  # w:num to w:abstractNum
        self._starts: dict[str, dict[int, int]] = {}  # by w:num: new starts, until it is used
        self._styles: dict[str, _Style] = {}
        self._list = _List()
        self._level = _Level()
        self._style = _Style()
        self._number = ""
        self._override = 0

    def define(self, name: str, values: Mapping[str, str]) -> None:
        """Read the start of an element of ``numbering.xml``."""
        value = values.get("val", "")
        if name == "abstractNum":
            self._list = self._lists.setdefault(values.get("abstractNumId", ""), _List())
        elif name == "numStyleLink":
            self._list.style = value
        elif name == "lvl":
            self._level = _Level()
            self._list.levels[whole(values.get("ilvl", "0"))] = self._level
        elif name == "num":
            self._number = values.get("numId", "")
            self._list = _List()  # a w:num may redefine levels, which hardly occurs: left out
        elif name == "abstractNumId":
            self._numbers[self._number] = value
        elif name == "lvlOverride":
            self._override = whole(values.get("ilvl", "0"))
        elif name == "startOverride":
            self._starts.setdefault(self._number, {})[self._override] = whole(value)
        else:
            self._level.set(name, values)

    def define_style(self, name: str, values: Mapping[str, str]) -> None:
        """Read the start of an element of ``styles.xml``."""
        value = values.get("val", "")
        if name == "style":
            self._style = self._styles.setdefault(values.get("styleId", ""), _Style())
        elif name == "basedOn":
            self._style.based_on = value
        elif name == "numId":
            self._style.number = value
        elif name == "ilvl":
            self._style.level = whole(value)

    def label(self, style: str, number: str | None, level: int | None) -> str:
        """Count a paragraph, and return its number or bullet with the gap; "" without one.

        Args:
            number, level: of the paragraph itself; None for those of its style.
        """
        if number is None:
            number, level, style = self._of_style(style, level)
        found = self._definition(number)
        if found is None:
            return ""
        if level is None:
            named = (at for at, each in found.levels.items() if style and each.style == style)
            level = next(named, 0)
        return self._count(found, number, level)

    def _of_style(self, style: str, level: int | None) -> tuple[str, int | None, str]:
        seen: set[str] = set()
        while style in self._styles and style not in seen:
            seen.add(style)
            each = self._styles[style]
            if each.number is not None:
                return each.number, each.level if level is None else level, style
            style = each.based_on
        return "", level, ""

    def _definition(self, number: str) -> _List | None:
        found = self._lists.get(self._numbers.get(number, ""))
        if found is not None and found.style in self._styles and not found.levels:
            other = self._styles[found.style].number or ""
            found = self._lists.get(self._numbers.get(other, ""))
        return found

    def _count(self, found: _List, number: str, at: int) -> str:
        level = found.levels.get(at)
        if level is None or at >= _LEVELS:
            return ""
        starts = self._starts.get(number, {})
        if at in starts:  # only the first paragraph of the list starts again
            found.counts[at] = starts.pop(at) - 1
        found.counts[at] = found.counts.get(at, level.start - 1) + 1
        for deeper in range(at + 1, _LEVELS):
            found.counts.pop(deeper, None)
        if level.form == "bullet":
            return _bullet(level) + level.gap
        text = level.text
        for upper in range(at + 1):
            own = found.levels.get(upper, level)
            count = found.counts.setdefault(upper, own.start) if f"%{upper + 1}" in text else 0
            form = "decimal" if level.legal else own.form
            text = text.replace(f"%{upper + 1}", _counted(count, form))
        return text + level.gap if text else ""


def is_on(values: Mapping[str, str]) -> bool:
    """Return whether an element switches something on; without a value it does."""
    return values.get("val", "1") not in _OFF


def whole(text: str) -> int:
    """Return a number of an attribute; 0 for what is none."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _bullet(level: _Level) -> str:
    if len(level.text) != 1:
        return level.text or _BULLET
    shown = symbol(ord(level.text), level.font)
    return _BULLET if shown in (REPLACEMENT, "o") else shown


def _counted(count: int, form: str) -> str:
    """Return a number in one of Word's forms; forms of other scripts are shown as decimal."""
    if form == "none":
        return ""
    if form in ("lowerLetter", "upperLetter") and count > 0:
        text = chr(ord("a") + (count - 1) % 26) * min((count + 25) // 26, 99)
    elif form in ("lowerRoman", "upperRoman") and 0 < count < 4000:
        text, left = "", count
        for value, letters in _ROMAN:
            text += letters * (left // value)
            left %= value
    else:
        text = f"{count:02}" if form == "decimalZero" else str(count)
    return text.upper() if form.startswith("upper") else text
