"""Documents that pandoc reads, e-mail, and pages of PDFs: their text, and what is refused."""

from __future__ import annotations

import base64
import gzip
import io
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from pptx import Presentation

from aiflux.converters import directory_to_jsonl
from aiflux.errors import InputError, UsageError
from tests.unit.converters.test_converters import prompts, refused, requests_in, write

OFFICE = "urn:oasis:names:tc:opendocument:xmlns"
ODT = (
    f'<office:document-content xmlns:office="{OFFICE}:office:1.0" xmlns:text="{OFFICE}:text:1.0">'
    "<office:body><office:text><text:h text:outline-level='1'>Kopf</text:h>"
    "<text:p>Grüße &amp; more</text:p></office:text></office:body></office:document-content>"
)
STYLES = (
    f'<office:document-styles xmlns:office="{OFFICE}:office:1.0"><office:font-face-decls/>'
    "<office:styles/><office:automatic-styles/><office:master-styles/></office:document-styles>"
)
OPF = (
    '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/><manifest>'
    '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
    '<spine><itemref idref="a"/></spine></package>'
)
CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles>'
    "</container>"
)
HTML = "<html><head><style>x {}</style></head><body><p>Grüße<script>bad()</script> &amp; more</p>"
RTF = r"{\rtf1\ansi\ansicpg1252 Gr\'fc\'dfe & {\b more}\par next}"


def packed(path: Path, mimetype: str, **parts: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("mimetype", mimetype, zipfile.ZIP_STORED)
        for name, text in parts.items():
            package.writestr(name.replace("__", "/").replace("_", "."), text)
    return path


def documents(folder: Path) -> Path:
    folder.mkdir()
    parts = {"content_xml": ODT, "styles_xml": STYLES}
    packed(folder / "a.odt", "application/vnd.oasis.opendocument.text", **parts)
    parts = {"META-INF__container_xml": CONTAINER, "c_opf": OPF, "a_xhtml": f"{HTML}</body></html>"}
    packed(folder / "b.epub", "application/epub+zip", **parts)
    write(folder / "c.rtf", RTF)
    write(folder / "d.html", HTML)
    write(
        folder / "e.HTM", HTML.replace("<style>", "<meta charset='cp1252'><style>").encode("cp1252")
    )
    (folder / "f.html.gz").write_bytes(gzip.compress(HTML.encode()))
    deck = Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text = "Grüße & more"
    slide.placeholders[1].text = "next"
    deck.save(folder / "g.pptx")
    return folder


def test_documents_have_the_text_that_their_programs_show(tmp_path: Path) -> None:
    summary = directory_to_jsonl(documents(tmp_path / "in"), tmp_path / "o.jsonl")
    found = prompts(tmp_path / "o.jsonl")
    assert summary.requests == summary.rows == 7
    for name, text in found.items():
        assert "Grüße & more" in " ".join(text.split()), name
        assert not {"<", "\\", "bad"} & {*text.split()}, name
        assert "bad()" not in text
        assert "x {}" not in text
    assert "Kopf" in found["a.odt"]
    assert "next" in found["c.rtf"]
    assert "next" in found["g.pptx"]


def test_a_document_cannot_include_other_files(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.html", "<p>secret</p>")
    page = f'<p>seen</p><iframe src="{secret}"></iframe><img src="file://{secret}">'
    write(tmp_path / "in" / "a.html", page)
    directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    (text,) = prompts(tmp_path / "o.jsonl").values()
    assert "seen" in text
    assert "secret\n" not in text


def test_damaged_documents_are_listed(tmp_path: Path) -> None:
    folder = documents(tmp_path / "in")
    whole = (folder / "g.pptx").read_bytes()
    write(folder / "g.pptx", whole[: len(whole) // 2])
    packed(folder / "h.odt", "x", content_xml="<not xml", styles_xml=STYLES)
    packed(folder / "i.odt", "x", content_xml=" " * (256 << 20) + "x")
    with pytest.raises(InputError, match="3 of 9 files") as error:
        directory_to_jsonl(folder, tmp_path / "o.jsonl")
    for words in ("g.pptx: the document is damaged", "h.odt: the document is damaged",
                  "i.odt: it decompresses to 256 MiB"):  # fmt: skip
        assert words in refused(error)


def test_an_e_mail_has_its_header_body_and_attachments(tmp_path: Path) -> None:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "Änne <a@x.org>", "b@x.org", "Über uns"
    mail.set_content("Grüße\nund mehr", charset="iso-8859-1")
    mail.add_alternative("<p>not this</p>", subtype="html")
    mail.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="bill.pdf")
    write(tmp_path / "in" / "a.eml", bytes(mail))
    only = EmailMessage()
    only["Subject"] = "x"
    only.set_content("<p>from <b>HTML</b></p>", subtype="html")
    write(tmp_path / "in" / "b.eml", bytes(only))
    directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    first, second = prompts(tmp_path / "o.jsonl").values()
    assert first == (
        "From: Änne <a@x.org>\nTo: b@x.org\nSubject: Über uns\n\nGrüße\nund mehr\n\n"
        "Attachments: bill.pdf"
    )
    assert second == "Subject: x\n\nfrom HTML"
    write(tmp_path / "in" / "c.eml", "\nno header")
    with pytest.raises(InputError, match="1 of 3 files") as error:
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert "c.eml: not an e-mail" in refused(error)


def scan(path: Path, pages: int) -> Path:
    """Write a PDF whose pages are pictures."""
    pictures = []
    for number in range(pages):
        picture = Image.new("RGB", (850, 1100), "white")
        ImageDraw.Draw(picture).text((100, 100), f"page {number}", fill="black")
        pictures.append(picture)
    path.parent.mkdir(exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


def test_scanned_pages_are_reported_and_can_be_sent_as_images(tmp_path: Path) -> None:
    folder = scan(tmp_path / "in" / "scan.pdf", 2).parent
    write(folder / "a.txt", "text")
    summary = directory_to_jsonl(folder, tmp_path / "o.jsonl")
    assert str(summary.examples[0]) == (
        "scan.pdf: contains no text: its pages seem to be scanned (2); "
        "use OCR, or --pdf-pages images"
    )
    template = "Page {chunk} of {chunks}: transcribe {source_file} {text}"
    options = {"template": template, "pdf_pages": "images"}
    summary = directory_to_jsonl(folder, tmp_path / "p.jsonl", **options)
    text, first, second = requests_in(tmp_path / "p.jsonl")
    assert (summary.requests, summary.rows) == (3, 2)
    assert text["body"]["messages"][0]["content"].endswith("a.txt text")
    assert [each["custom_id"] for each in (first, second)] == ["scan.pdf#1", "scan.pdf#2"]
    assert second["metadata"] == {"source_file": "scan.pdf", "page": 2, "pages": 2}
    prompt, picture = second["body"]["messages"][0]["content"]
    assert prompt["text"] == "Page 2 of 2: transcribe scan.pdf "
    same = {**options, "template": "Transcribe this page.", "patterns": ["*.pdf"]}
    directory_to_jsonl(folder, tmp_path / "q.jsonl", **same)
    asked = [
        each["body"]["messages"][0]["content"][0] for each in requests_in(tmp_path / "q.jsonl")
    ]
    assert [each["text"] for each in asked] == ["Transcribe this page."] * 2
    content = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        assert 900_000 < image.width * image.height <= 1_060_000
    write(folder / "bad.pdf", "%PDF-1.7 nothing")
    with pytest.raises(InputError, match="1 of 3 files") as error:
        directory_to_jsonl(folder, tmp_path / "q.jsonl", **options)
    assert "bad.pdf: the PDF is damaged" in refused(error)
    for wrong in (
        {"examples": [{"chunk": 1, "chunks": 2, "source_file": "a", "text": "", "answer": "b"}]},
        {"template": "{text}"},
        {"pdf_pages": "both"},
        {"endpoint": "completions"},
    ):
        with pytest.raises(UsageError, match="--pdf-pages"):
            directory_to_jsonl(folder, tmp_path / "q.jsonl", **{**options, **wrong})
