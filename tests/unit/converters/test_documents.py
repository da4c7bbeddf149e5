"""PDF and DOCX files: the text sent is the text that their readers show."""

# ruff: noqa: E501 - a document is a line

from __future__ import annotations

import io
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.converters import directory_to_jsonl
from aiflux.converters.cells import BadRowError
from aiflux.converters.documents import NoTextError, docx_text, read_document
from tests.unit.converters.test_converters import small_pdf, write

TRANSITIONAL = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
STRICT = "http://purl.oclc.org/ooxml/wordprocessingml/main"
COMPATIBILITY = "http://schemas.openxmlformats.org/markup-compatibility/2006"


def docx(body: str, space: str = TRANSITIONAL, **parts: str) -> bytes:
    """Return a DOCX with the parts required by Word."""
    office = space.partition("/wordprocessingml")[0] + "/officeDocument"
    if space == TRANSITIONAL:
        office += "/2006"
    root = f'xmlns:w="{space}" xmlns:mc="{COMPATIBILITY}" xmlns:v="v" xmlns:wps="wps"'
    relation = '<Relationship Id="{0}" Type="{1}/relationships/{0}" Target="{2}"/>'
    related = "".join(relation.format(name, office, f"{name}.xml") for name in parts)
    listing = '<Relationships xmlns="r">{}</Relationships>'
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as package:
        main = relation.format("officeDocument", office, "/word/document.xml")
        package.writestr("_rels/.rels", listing.format(main))
        package.writestr("word/_rels/document.xml.rels", listing.format(related))
        package.writestr(
            "word/document.xml", f"<w:document {root}><w:body>{body}</w:body></w:document>"
        )
        for name, content in parts.items():
            package.writestr(f"word/{name}.xml", f"<w:{name} {root}>{content}</w:{name}>")
    return file.getvalue()


def run(text: str) -> str:
    return f'<w:r><w:rPr><w:b/></w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def p(*content: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr>{''.join(content)}</w:p>"


def box(text: str) -> str:
    """Return a text box as Word writes it: once for new readers and once for old ones."""
    inner = f"<w:txbxContent>{p(run(text))}</w:txbxContent>"
    return (
        f'<w:r><mc:AlternateContent><mc:Choice Requires="wps"><w:drawing><wps:txbx>{inner}</wps:txbx>'
        f"</w:drawing></mc:Choice><mc:Fallback><w:pict><v:textbox>{inner}</v:textbox></w:pict>"
        "</mc:Fallback></mc:AlternateContent></w:r>"
    )


def field(code: str, result: str) -> str:
    def char(kind: str) -> str:
        return f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>'

    instruction = f"<w:r><w:instrText>{code}</w:instrText></w:r>"
    nested = char("begin") + instruction + char("separate") + run("not shown") + char("end")
    return char("begin") + instruction + nested + char("separate") + run(result) + char("end")


def table(*rows: tuple[str, ...]) -> str:
    cells = ("".join(f"<w:tc><w:tcPr/>{cell}</w:tc>" for cell in row) for row in rows)
    return f"<w:tbl><w:tblPr/>{''.join(f'<w:tr>{row}</w:tr>' for row in cells)}</w:tbl>"


TEXTS = {
    "insertion": (
        p(run("the king of "), f"<w:ins>{run('France')}</w:ins>", run(" died")),
        "the king of France died",
    ),
    "deletion": (
        p(run("a"), "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>", run("b")),
        "ab",
    ),
    "moved": (
        p(f"<w:moveFrom>{run('from')}</w:moveFrom>", f"<w:moveTo>{run('to')}</w:moveTo>"),
        "to",
    ),
    "deleted end": (
        p(run("one, "), properties="<w:rPr><w:del/></w:rPr>") + p(run("two")),
        "one, two",
    ),
    "inserted end": (
        p(run("one"), properties="<w:rPr><w:ins/></w:rPr>") + p(run("two")),
        "one\ntwo",
    ),
    "control": (
        f"<w:sdt><w:sdtPr/><w:sdtContent>{p(run('block'))}</w:sdtContent></w:sdt>"
        + p(f"<w:sdt><w:sdtContent>{run('inline')}</w:sdtContent></w:sdt>"),
        "block\ninline",
    ),
    "wrappers": (
        p(
            f"<w:smartTag><w:customXml>{run('Rome')}</w:customXml></w:smartTag>",
            f"<w:hyperlink>{run(' link')}</w:hyperlink>",
        ),
        "Rome link",
    ),
    "text box": (p(run("before"), box("inside"), run(" after")), "before after\ninside"),
    "field": (
        p(
            run("on "),
            field(" DATE ", "3 May"),
            f'<w:fldSimple w:instr="PAGE">{run("!")}</w:fldSimple>',
        ),
        "on 3 May!",
    ),
    "tables": (
        table(
            (p(run("a")), table((p(run("in")), p(run("ner")))) + p()), (p(run("c")), p(run("d")))
        ),
        "a\tin\tner\n\nc\td",
    ),
    "control in a table": (
        "<w:tbl><w:sdt><w:sdtContent><w:tr><w:tc>" + p(run("x")) + "</w:tc></w:tr>"
        "</w:sdtContent></w:sdt></w:tbl>",
        "x",
    ),
    "deleted row": (
        "<w:tbl><w:tr><w:trPr><w:del/></w:trPr><w:tc>"
        + p(run("x"))
        + "</w:tc></w:tr></w:tbl>"
        + p(run("y")),
        "y",
    ),
    "signs": (
        p(
            "<w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t><w:noBreakHyphen/></w:r>",
            properties='<w:tabs><w:tab w:val="left"/></w:tabs>',
        ),
        "a\tb\nc\u2011",
    ),
    "hidden": (
        p(
            "<w:r><w:rPr><w:vanish/></w:rPr><w:t>x</w:t></w:r>",
            run("y"),
            '<w:r><w:rPr><w:vanish w:val="0"/></w:rPr><w:t>z</w:t></w:r>',
        ),
        "yz",
    ),
}


@pytest.mark.parametrize("space", [TRANSITIONAL, STRICT])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_text_that_word_shows_is_read(kind: str, space: str) -> None:
    body, shown = TEXTS[kind]
    assert docx_text(io.BytesIO(docx(body, space))) == shown


wrapped = st.recursive(
    st.tuples(st.just("run"), st.text("abc ", min_size=1, max_size=5)),
    lambda inner: st.tuples(
        st.sampled_from(["ins", "sdt", "smartTag", "hyperlink", "moveTo", "customXml", "del"]),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


def as_xml(tree: object) -> tuple[str, str]:
    """Return a tree as XML, and the text that it shows."""
    kind, inner = tree  # type: ignore[misc]
    if kind == "run":
        return run(inner), inner
    parts = [as_xml(each) for each in inner]
    xml, shown = ("".join(each) for each in zip(*parts, strict=True)) if parts else ("", "")
    if kind == "sdt":
        return f"<w:sdt><w:sdtPr/><w:sdtContent>{xml}</w:sdtContent></w:sdt>", shown
    return f"<w:{kind}>{xml}</w:{kind}>", "" if kind == "del" else shown


@given(st.lists(wrapped, max_size=5))
@settings(deadline=None, max_examples=50)
def test_nested_wrappers_do_not_hide_text(trees: list[object]) -> None:
    parts = [as_xml(tree) for tree in trees]
    body = p(*(xml for xml, _ in parts))
    assert docx_text(io.BytesIO(docx(body))) == "".join(shown for _, shown in parts)


def level(at: int, form: str, text: str, more: str = "") -> str:
    return (
        f'<w:lvl w:ilvl="{at}"><w:numFmt w:val="{form}"/><w:lvlText w:val="{text}"/>{more}</w:lvl>'
    )


def item(text: str, number: str = "1", at: int = 0) -> str:
    properties = f'<w:numPr><w:ilvl w:val="{at}"/><w:numId w:val="{number}"/></w:numPr>'
    return p(run(text), properties=properties)


def lists(body: str, *levels: str, more: str = "", styles: str = "") -> list[str]:
    """Return the lines of a document with the lists 1 and 2 of one definition."""
    numbering = (
        f'<w:abstractNum w:abstractNumId="0">{"".join(levels)}</w:abstractNum>'
        '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
        f'<w:num w:numId="2"><w:abstractNumId w:val="0"/>{more}</w:num>'
    )
    return docx_text(io.BytesIO(docx(body, numbering=numbering, styles=styles))).split("\n")


OUTLINE = (level(0, "decimal", "%1."), level(1, "lowerLetter", "%1.%2)"), level(2, "none", ""))
FROM_7 = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="7"/></w:lvlOverride>'


def test_levels_count_and_deeper_ones_begin_again() -> None:
    body = "".join(item(text, at=at) for text, at in
                   [("x", 0), ("x", 1), ("x", 1), ("x", 2), ("x", 0), ("x", 1), ("", 0)])  # fmt: skip
    shown = ["1. x", "1.a) x", "1.b) x", "x", "2. x", "2.a) x", "3."]
    assert lists(body, *OUTLINE) == shown
    assert lists(item("deep", at=1) + item("x"), *OUTLINE) == ["1.a) deep", "2. x"]


def test_lists_of_one_definition_continue_unless_one_starts_again() -> None:
    body = item("a") + item("b", "2") + item("c", "2") + item("d", "0") + item("e", "99")
    assert lists(body, *OUTLINE) == ["1. a", "2. b", "3. c", "d", "e"]
    assert lists(body, *OUTLINE, more=FROM_7)[:3] == ["1. a", "7. b", "8. c"]


def test_styles_number_headings() -> None:
    styles = (
        '<w:style w:styleId="H1"><w:pPr><w:numPr><w:numId w:val="1"/></w:numPr></w:pPr></w:style>'
        '<w:style w:styleId="H2"><w:basedOn w:val="H1"/><w:pPr><w:numPr><w:ilvl w:val="1"/>'
        '<w:numId w:val="1"/></w:numPr></w:pPr></w:style>'
        '<w:style w:styleId="Sub"><w:basedOn w:val="H2"/></w:style>'
        '<w:style w:styleId="Loop"><w:basedOn w:val="Loop"/></w:style>'
    )
    levels = (level(0, "upperRoman", "Part %1:"), level(1, "decimal", "%1.%2", "<w:isLgl/>"))
    names = ["H1", "H2", "Sub", "H1", "Sub", "Loop", "unknown"]
    body = "".join(p(run(name), properties=f'<w:pStyle w:val="{name}"/>') for name in names)
    assert lists(body, *levels, styles=styles) == [
        "Part I: H1", "1.1 H2", "1.2 Sub", "Part II: H1", "2.1 Sub", "Loop", "unknown"
    ]  # fmt: skip
    off = p(run("off"), properties='<w:pStyle w:val="H1"/><w:numPr><w:numId w:val="0"/></w:numPr>')
    assert lists(off, *levels, styles=styles) == ["off"]


def test_changed_and_deleted_items_do_not_count() -> None:
    old = '<w:pPrChange><w:pPr><w:numPr><w:numId w:val="1"/></w:numPr></w:pPr></w:pPrChange>'
    gone = p(
        f"<w:del>{run('x')}</w:del>",
        properties='<w:numPr><w:numId w:val="1"/></w:numPr><w:rPr><w:del/></w:rPr>',
    )
    body = item("a") + p(run("no item now"), properties=old) + gone + item("b")
    assert lists(body, *OUTLINE) == ["1. a", "no item now", "2. b"]


@pytest.mark.parametrize(
    ("form", "text", "font", "shown"),
    [
        ("bullet", "\uf0b7", "Symbol", "\u2022 x"),
        ("bullet", "\uf0a7", "Wingdings", "\u25aa x"),
        ("bullet", "o", "Courier New", "\u2022 x"),
        ("bullet", "\uf001", "Webdings", "\u2022 x"),
        ("bullet", "\u2013", "Arial", "\u2013 x"),
        ("bullet", "", "", "\u2022 x"),
        ("decimalZero", "%1", "", "01 x"),
        ("upperLetter", "(%1)", "", "(A) x"),
        ("none", "Note", "", "Note x"),
        ("chineseCounting", "%1.", "", "1. x"),
    ],
)
def test_bullets_and_forms_of_numbers(form: str, text: str, font: str, shown: str) -> None:
    more = f'<w:rPr><w:rFonts w:ascii="{font}"/></w:rPr>'
    assert lists(item("x"), level(0, form, text, more)) == [shown]
    glued = f'<w:suff w:val="nothing"/>{more}'
    assert lists(item("x"), level(0, form, text, glued)) == [shown.replace(" x", "x")]


def test_letters_after_z_are_doubled() -> None:
    lines = lists(item("x") * 60, level(0, "lowerLetter", "%1."))
    assert [lines[at] for at in (25, 26, 27, 52)] == ["z. x", "aa. x", "bb. x", "aaa. x"]


VALUES = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100, "d": 500, "m": 1000}


@given(st.integers(1, 3999))
@settings(deadline=None, max_examples=50)
def test_roman_numbers(number: int) -> None:
    start = f'<w:start w:val="{number}"/>'
    (line,) = lists(item("x"), level(0, "lowerRoman", "%1.", start))
    roman = line.removesuffix(". x")
    signed = [
        -VALUES[letter] if VALUES.get(after, 0) > VALUES[letter] else VALUES[letter]
        for letter, after in zip(roman, roman[1:] + " ", strict=True)
    ]
    assert sum(signed) == number
    assert not any(letter * 4 in roman for letter in VALUES)


@given(st.text(), st.text(), st.text())
@settings(deadline=None, max_examples=50)
def test_any_value_in_the_numbering_is_read(value: str, form: str, text: str) -> None:
    value, form, text = (escaped(each) for each in (value, form, text))
    start = f'<w:start w:val="{value}"/><w:suff w:val="{value}"/>'
    lines = lists(item("x", at=0), level(0, form, text, start), more=FROM_7.replace("7", value))
    assert lines[-1].endswith("x")


def test_a_hostile_numbering_costs_little() -> None:
    deep = level(999_999_999, "decimal", "%1.")
    assert lists(item("x", at=999_999_999), deep) == ["x"]
    (line,) = lists(item("x"), level(0, "none", "a" * 1_000_000))
    assert len(line) < 200


def escaped(text: str) -> str:
    """Return a text as it may stand in an attribute."""
    kept = "".join(char for char in text if char.isprintable() and char not in '<&"\ufffe\uffff')
    return "".join(f"&#{ord(char)};" for char in kept)


@pytest.mark.parametrize(
    ("font", "code", "shown"),
    [
        ("Symbol", "F061", "\u03b1"),
        ("Symbol", "0061", "\u03b1"),
        ("symbol", "F0B3", "\u2265"),
        ("Symbol", "F057", "\u03a9"),
        ("Symbol", "F0E6", "\u239b"),
        ("Wingdings", "F0FC", "\u2713"),
        ("Wingdings", "F0FE", "\u2611"),
        ("Wingdings", "F021", "\ufffd"),
        ("Webdings", "F061", "\ufffd"),
        ("Arial", "2022", "\u2022"),
        ("", "D800", "\ufffd"),
        ("", "110000", "\ufffd"),
        ("", "x", "\ufffd"),
        ("", "", "\ufffd"),
    ],
)
def test_characters_of_symbol_fonts(font: str, code: str, shown: str) -> None:
    sign = f'<w:r><w:sym w:font="{font}" w:char="{code}"/></w:r>'
    assert docx_text(io.BytesIO(docx(p(run("a"), sign, run("b"))))) == f"a{shown}b"


def test_notes_come_last_with_their_numbers() -> None:
    note = '<w:footnote w:id="-1">{0}</w:footnote><w:footnote w:id="7">{1}</w:footnote>'
    body = p(run("Word"), '<w:r><w:footnoteReference w:id="7"/></w:r>', run(".")) + p(run("End"))
    content = docx(body, footnotes=note.format(p(run("separator")), p(run("A note."))))
    assert docx_text(io.BytesIO(content)) == "Word[1].\nEnd\n[1] A note."


def test_entities_cannot_exhaust_memory(tmp_path: Path) -> None:
    content = docx(p(run("x")))
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;">]><a>&b;</a>'
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as package, pytest.warns(UserWarning, match="Duplicate"):
        package.writestr("word/document.xml", bomb)
    with pytest.raises(BadRowError, match="document type"):
        read_document(write(tmp_path / "a.docx", file.getvalue()))


def test_an_encrypted_docx_is_reported_as_encrypted(tmp_path: Path) -> None:
    with pytest.raises(BadRowError, match="encrypted DOCX or old Word file"):
        read_document(write(tmp_path / "a.docx", b"\xd0\xcf\x11\xe0" + bytes(600)))


def encrypted(owner: str, user: str, algorithm: str) -> bytes:
    writer = pypdf.PdfWriter(io.BytesIO(small_pdf("Kept from printing")))
    writer.encrypt(user, owner, algorithm=algorithm)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_a_pdf_with_only_an_owner_password_is_read(tmp_path: Path, algorithm: str) -> None:
    path = write(tmp_path / "a.pdf", encrypted("owner", "", algorithm))
    assert read_document(path).text == "Kept from printing"
    path.write_bytes(encrypted("owner", "user", algorithm))
    with pytest.raises(BadRowError, match="encrypted; save a copy without a password"):
        read_document(path)


GLYPHS = (
    b"<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/DescendantFonts[<</Type/Font"
    b"/Subtype/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)"
    b"/Supplement 0>>>>]>>"
)
NUMBERED = b"<</Type/Font/Subtype/Type1/BaseFont/X/Encoding<</Differences[72/g1 105/g2]>>>>"


@pytest.mark.parametrize("font", [GLYPHS, NUMBERED])
def test_a_pdf_whose_fonts_do_not_map_to_letters_is_skipped(tmp_path: Path, font: bytes) -> None:
    content = small_pdf("Hi" * 20, font)
    write(tmp_path / "in" / "a.pdf", content)
    with pytest.raises(NoTextError, match="fonts do not map glyphs to letters"):
        read_document(tmp_path / "in" / "a.pdf")
    write(tmp_path / "in" / "b.txt", "good")
    summary = directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert (summary.requests, summary.skipped) == (1, 1)


@pytest.mark.parametrize("kind", ["docx", "pdf"])
def test_a_damaged_document_is_rejected_or_read(tmp_path: Path, kind: str) -> None:
    everything = docx("".join(body for body, _ in TEXTS.values()), footnotes="")
    whole = everything if kind == "docx" else encrypted("owner", "", "AES-256")
    chance = random.Random(7)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path = write(
            tmp_path / f"a.{kind}", bytes(content[: chance.choice([None, len(content) // 2])])
        )
        with suppress(BadRowError, NoTextError):
            assert read_document(path).text
