"""Texts in the encodings of many languages: read correctly, or rejected with the candidates."""

# ruff: noqa: E501 - a text is a line

from __future__ import annotations

import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from aiflux.converters import csv_to_jsonl, directory_to_jsonl
from aiflux.converters.encoding import UnclearEncodingError, decoded, detect_encoding
from aiflux.errors import InputError
from tests.unit.converters.test_converters import prompts, refused, write

# Article 1 of the Universal Declaration of Human Rights, and the encodings used per language.
WESTERN = "cp1252 iso8859-15 mac-roman cp850"
CENTRAL = "cp1250 iso8859-2 cp852 mac-latin2"
ARTICLES = {
    "de": (WESTERN, "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen, für größere Güte."),
    "fr": (WESTERN, "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité."),
    "es": (WESTERN, "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, deben comportarse fraternalmente; ningún niño será señalado mañana."),
    "pt": (WESTERN, "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, devem agir uns para com os outros em espírito de fraternidade. Ações são difíceis."),
    "sv": (WESTERN, "Alla människor är födda fria och lika i värde och rättigheter. De har utrustats med förnuft och samvete och bör handla gentemot varandra i en anda av gemenskap på många sätt."),
    "da": (WESTERN, "Alle mennesker er født frie og lige i værdighed og rettigheder. De er udstyret med fornuft og samvittighed, og de bør handle mod hverandre i en broderskabets ånd på øen."),
    "fi": (WESTERN, "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä."),
    "is": ("cp1252 iso8859-1 cp861 mac-iceland", "Hver maður er borinn frjáls og jafn öðrum að virðingu og réttindum. Menn eru gæddir vitsmunum og samvisku, og ber þeim að breyta bróðurlega hverjum við annan."),
    "pl": (CENTRAL, "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa."),
    "cs": (CENTRAL, "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají spolu jednat v duchu bratrství."),
    "hu": (CENTRAL, "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek, a hűség útján."),
    "ro": ("cp1250 iso8859-2 iso8859-16 cp852 mac-romanian", "Toate fiinţele umane se nasc libere şi egale în demnitate şi în drepturi. Ele sunt înzestrate cu raţiune şi conştiinţă şi trebuie să se comporte unele faţă de altele în spiritul fraternităţii."),
    "hr": (CENTRAL + " mac-croatian", "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima. Ona su obdarena razumom i sviješću i trebaju jedna prema drugima postupati u duhu bratstva; još više čuvati život."),
    "tr": ("cp1254 iso8859-9 cp857 mac-turkish", "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler."),
    "lt": ("cp1257 iso8859-13 cp775", "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir sąžinė ir jie turi elgtis vienas kito atžvilgiu kaip broliai."),
    "lv": ("cp1257 iso8859-13 iso8859-4 cp775", "Visi cilvēki piedzimst brīvi un vienlīdzīgi savā pašcieņā un tiesībās. Viņi ir apveltīti ar saprātu un sirdsapziņu, un viņiem jāizturas citam pret citu brālības garā."),
    "ru": ("cp1251 koi8-r iso8859-5 cp866 mac-cyrillic", "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства."),
    "uk": ("cp1251 koi8-u mac-cyrillic cp1125", "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і повинні діяти у відношенні один до одного в дусі братерства."),
    "bg": ("cp1251 iso8859-5 cp866 mac-cyrillic", "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да се отнасят помежду си в дух на братство."),
    "el": ("cp1253 iso8859-7 cp737 mac-greek", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης."),
    "he": ("cp1255 iso8859-8 cp862", "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג איש ברעהו ברוח של אחווה."),
    "ar": ("cp1256 iso8859-6 cp720", "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء."),
    "th": ("cp874 tis-620", "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ"),
    "ja": ("cp932 euc-jp iso2022-jp", "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。"),
    "ko": ("cp949 euc-kr iso2022-kr johab", "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다."),
    "zh-CN": ("gb2312 gbk gb18030 hz", "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"),
    "zh-TW": ("big5 cp950", "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。"),
}  # fmt: skip
CASES = [(text, name) for names, text in ARTICLES.values() for name in names.split()]
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


def encoded(text: str, name: str) -> bytes:
    """Encode a text, dropping letters that the encoding lacks."""
    return text.encode(name, "ignore")


def objection(content: bytes) -> str:
    """Return why bytes are rejected, or "" if they are read."""
    try:
        decoded(content)
    except UnclearEncodingError as error:
        return str(error)
    return ""


def test_no_text_is_misread_and_most_are_read() -> None:
    """Whole articles and their first halves, in all encodings used for their language."""
    came = Counter[str]()
    for text, name in CASES:
        for part in (text, text[: len(text) // 2]):
            content = encoded(part, name)
            refusal = objection(content)
            came["refused" if refusal else "read"] += 1
            if refusal:
                assert re.search(r"may be \S+ \(['\"]", refusal), (name, refusal)
            else:
                assert decoded(content)[0] == content.decode(name), (name, part)
    assert came["read"] > 7 * came["refused"], came


def test_the_example_words_of_candidates_differ() -> None:
    for text, name in CASES:
        for size in (12, 30, 60):
            refusal = objection(encoded(text[:size], name))
            words = re.findall(r"\((['\"].*?['\"])\)", refusal)
            assert len(set(words)) == len(words), refusal


@pytest.mark.parametrize("name", WIDE)
def test_utf_16_and_32_without_byte_order_mark_are_read(tmp_path: Path, name: str) -> None:
    """Also in a directory. Detection needs a space or an ASCII character."""
    texts = {f"{key}.txt": text for key, (_, text) in ARTICLES.items() if key != "ja"}
    for key, text in texts.items():
        write(tmp_path / "in" / key, text.encode(name))
    summary = directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert prompts(tmp_path / "o.jsonl") == texts
    assert any(note.startswith(f"{name} (guessed): 26 files") for note in summary.notes)


def test_noise_is_not_read_as_utf_16_or_32() -> None:
    chance = random.Random(3)
    for size in range(40, 400):
        content = chance.randbytes(size) + b"\0"
        with pytest.raises((UnclearEncodingError, UnicodeDecodeError)):
            decoded(content)


DECLARED = {
    "xml": ("<?xml version='1.0' encoding='iso-8859-2'?>\n<a>{}</a>", "iso8859-2"),
    "meta": ('<html><head><META charset="windows-1250"></head>{}</html>', "cp1250"),
    "http-equiv": ("<meta http-equiv='x' content='text/html; charset=ISO-8859-2'>{}", "iso8859-2"),
    "css": ('@charset "iso-8859-2";\na::after {{ content: "{}" }}', "iso8859-2"),
    "script": ("#!/usr/bin/python\n# -*- coding: cp852 -*-\nx = '{}'\n", "cp852"),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_a_declared_encoding_takes_precedence_over_a_guess(tmp_path: Path, kind: str) -> None:
    form, name = DECLARED[kind]
    text = form.format("Ő és ű")  # too short for a guess
    write(tmp_path / "in" / "a.txt", text.encode(name))
    summary = directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert prompts(tmp_path / "o.jsonl") == {"a.txt": text}
    assert summary.notes == (f"{name} (declared): 1 file, 'a.txt'",)


def test_utf_8_wins_over_a_wrong_declaration(tmp_path: Path) -> None:
    """Many pages were re-saved as UTF-8 but kept their old declaration."""
    text = "<?xml version='1.0' encoding='latin1'?><a>Größe</a>"
    assert decoded(text.encode()) == (text, decoded(b"x")[1])


def test_a_directory_reports_the_encoding_assumed_for_each_file(tmp_path: Path) -> None:
    for key in ("de", "ru", "fr", "pl"):
        names, text = ARTICLES[key]
        write(tmp_path / "in" / f"{key}.txt", text.encode(names.split()[0]))
    write(tmp_path / "in" / "u.txt", "Größe")
    summary = directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    remedy = "; if this is wrong, set --encoding"
    assert summary.notes == (
        f"cp1252 (guessed): 2 files, 'de.txt', 'fr.txt'{remedy}",
        f"cp1250 (guessed): 1 file, 'pl.txt'{remedy}",
        f"cp1251 (guessed): 1 file, 'ru.txt'{remedy}",
    )


def test_asian_encodings_are_detected_deep_inside_a_file(tmp_path: Path) -> None:
    """The sample starts and ends at line ends, so it splits no character."""
    for key in ("ja", "ko", "zh-CN", "zh-TW"):
        names, text = ARTICLES[key]
        name = names.split()[0]
        content = ("text\n" + ("x" * 99 + "\n") * 700 + f"{text}\n" * 500).encode(name)
        source = write(tmp_path / f"{key}.csv", content)
        csv_to_jsonl(source, tmp_path / f"{key}.jsonl", template="{text}", delimiter=";")
        assert list(prompts(tmp_path / f"{key}.jsonl").values())[-1] == text


def test_damaged_texts_are_rejected_or_read(tmp_path: Path) -> None:
    chance = random.Random(11)
    for text, name in CASES[::3]:
        content = bytearray(encoded(text, name))
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path = write(tmp_path / "a.txt", bytes(content))
        with suppress(InputError):
            assert detect_encoding(path).name
        with suppress(UnclearEncodingError, UnicodeDecodeError):
            assert decoded(bytes(content))[0]


@pytest.mark.parametrize("text", ["Déjà vu", "naïve", "très voilà 3;señor", "à"])
def test_the_most_likely_encoding_is_always_among_the_candidates(text: str) -> None:
    """Each with whole words: those of two cells are apart."""
    refusal = objection(f"id;text\n1;{text}\n".encode("cp1252"))
    shown = re.search(r"cp1252 \((.*?)\)", refusal)
    assert shown is not None, refusal
    assert set(re.findall("'(.*?)'", shown[1])) <= set(re.split("[ ;]", text))


def test_repeated_french_words_are_not_read_as_baltic() -> None:
    """``très`` was read as ``trčs`` in tables that repeat a few texts."""
    texts = ["très bon produit", "déjà vu mais efficace"]
    rows = "".join(f"{number},{texts[number % 2]} {number}\n" for number in range(300))
    content = f"id,text\n{rows}".encode("cp1252")
    assert "cp1252 ('très', 'déjà')" in objection(content)


def test_a_rejected_table_suggests_the_option(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "id,text\n1,naïve\n".encode("cp1252"))
    with pytest.raises(InputError, match="its encoding is ambiguous") as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert "--encoding" in refused(error)
