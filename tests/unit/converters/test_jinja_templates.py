"""Jinja2 templates and expressions: names, values, errors, and what the sandbox refuses."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.converters.cells import BadRowError, as_text, cell
from aiflux.converters.jinja_template import Expression, JinjaTemplate
from aiflux.converters.template import Template
from aiflux.errors import InputError
from tests.unit.converters.test_converters import refused

texts = st.text() | st.sampled_from(
    ["{{ name }}", "{% if x %}", "{# a #}", "{name}", "{{", "}}", "-%}", "\r\n", " \n", "\ud800"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(texts, texts)
def test_any_text_comes_out_unchanged(one: str, other: str) -> None:
    template = JinjaTemplate('<{{ a }}|{{ row["b c"] }}|{% if a %}{{ a }}{% endif %}>')
    assert template.render({"a": one, "b c": other}) == f"<{one}|{other}|{one}>"


@given(st.lists(texts), st.dictionaries(texts, texts))
def test_texts_inside_values_come_out_unchanged(items: list[str], fields: dict[str, str]) -> None:
    template = JinjaTemplate("{% for item in a %}{{ item }}{% endfor %}{{ b.values() | join }}")
    assert template.render({"a": items, "b": fields}) == "".join([*items, *fields.values()])


@given(values)
def test_a_value_has_the_text_of_a_plain_template(value: Any) -> None:
    row = {"a": value}
    assert JinjaTemplate("{{ a }}").render(row) == Template("{a}").render(row) == as_text(value)


@pytest.mark.parametrize(
    ("text", "names", "whole"),
    [
        ("{{ b }}{{ a }}{{ b }}", ("b", "a"), False),
        ('{{ row["First name"] }}, {{ row.last }}', ("First name", "last"), False),
        ("{% for item in list %}{{ item }}{{ loop.index }}{% endfor %}", ("list",), False),
        ("{% set x = a %}{{ x }}{% for i in range(3) %}{{ i }}{% endfor %}", ("a",), False),
        ("{% for name, value in row.items() %}{{ name }}{% endfor %}", (), True),
        ("{{ row[a] }}", ("a",), True),
        ("{{ row | tojson }}", (), True),
        ("{{ meta.source }}", ("meta",), False),
        ("{% for row in rows %}{{ row.a }}{% endfor %}", ("rows",), False),
        ("{# {{ a }} #}{% raw %}{{ b }}{% endraw %}{{ ü }}", ("ü",), False),
        ("{{ range }}{{ dict.a }}", ("range", "dict"), False),
        ("{% set dict = 1 %}{{ dict }}{{ range(3) | list }}", (), False),
    ],
)
def test_the_names_that_a_template_uses(text: str, names: tuple[str, ...], whole: bool) -> None:
    template = JinjaTemplate(text)
    assert (template.names, template.whole) == (names, whole)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{% if stars > 3 %}good{% else %}bad{% endif %}\n", "good"),
        ("{% for x in list %}\n- {{ x }}\n  {% endfor %}\nend", "- 1\n- b\nend"),
        ("{{ meta.source }} {{ meta['source'] }} {{ list[0] + 1 }}", "web web 2"),
        ("{{ none_here }}|{{ yes }}|{{ day }}|{{ price }}", "|true|2026-11-27|1.50"),
        ("{{ list | tojson }} {{ meta | tojson(indent=1) }}", '[1, "b"] {\n "source": "web"\n}'),
        ("{{ words | tojson }}", '"it\'s <b> & é"'),
        ("{{ words | truncate(6, true, '...') }} {{ words | length }}", "it'... 12"),
        ("{{ list | map('string') | list }} {{ list | map('string') }}", '["1", "b"] ["1", "b"]'),
        ("{{ lacking | default('none') }}{% if lacking is defined %}x{% endif %}", "none"),
        ('{{ "=" * 3 }}{{ 2 ** 10 }}{{ row["day"].year }}', "===10242026"),
    ],
)
def test_values_keep_their_types(text: str, wanted: str) -> None:
    row = {
        "stars": 4, "list": [1, "b"], "meta": {"source": "web"}, "none_here": None, "yes": True,
        "day": date(2026, 11, 27), "price": Decimal("1.50"), "words": "it's <b> & é",
    }  # fmt: skip
    assert JinjaTemplate(text).render(row) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{{ text", ["'x.j2' is invalid at line 2", "unexpected end of template"]),
        ("{% if a %}", ["'x.j2' is invalid at line 1", "endif"]),
        ("{{ a | nofilter }}", ["'x.j2' is invalid at line 1", "nofilter"]),
        ("\n{% include '/etc/passwd' %}{{ a }}", ["line 2: another file cannot be included"]),
        ("{% import 'x' as x %}{{ a }}", ["another file cannot be included"]),
        ("{% from 'x' import y %}{{ a }}", ["another file cannot be included"]),
        ("{% extends a %}", ["another file cannot be included"]),
        ("{{ ''.__class__.__mro__ }}{{ a }}", ["'x.j2' is invalid", "__ is not accessible"]),
        ("{{ row.__class__ }}", ["__class__ is not accessible"]),
    ],
)
def test_an_invalid_template_is_refused_before_any_row(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        JinjaTemplate(text, "x.j2")
    assert [word for word in words if word not in refused(error)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ a['__class__'].mro() }}", "access to attribute '__class__'"),
        ("{{ a | attr('__class__') }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__}'.format(a) }}", "access to attribute '__class__'"),
        ("{{ 'a' | map(attribute='__class__') | list }}{{ a }}", "access to attribute '__class__'"),
        ("{{ [a] | map('attr', '__class__') | list }}", "access to attribute '__class__'"),
        ("{{ ('{a.__class__}'.format_map)(row) }}", "access to attribute"),
        ("{{ range['__self__'] }}{{ a }}", "access to attribute '__self__'"),
        ("{{ (cycler | attr('__init__')).x }}{{ a }}", "access to attribute '__init__'"),
        ("{{ namespace['__init__']['__globals__'] }}{{ a }}", "access to attribute '__init__'"),
        ("{{ dict.mro() }}{{ a }}", "access to attribute 'mro'"),
        ("{{ list.append(3) }}", "access to attribute 'append'"),
        ("{{ row.update(a=1) }}", "access to attribute 'update'"),
        ("{% for i in range(9**9) %}{{ a }}{% endfor %}", "more than 100000 numbers"),
        ("{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}{{ a }}",
         "more than 100000 numbers"),
        ("{{ a * 10 ** 9 }}", "the result of * is too large"),
        ("{{ 10 ** 9 * [a] }}", "the result of * is too large"),
        ("{{ 9 ** 9999 }}{{ a }}", "the result of ** is too large"),
        ("{% for i in range(999) %}{{ a * 10 ** 6 }}{% endfor %}", "the text is longer than"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(a) }}", "recursion"),
        ("{{ lipsum() }}{{ a }}", "no column or field 'lipsum'"),
        ("{{ 1 / (a | length - 1) }}", "division by zero"),
        ("{{ a > 3 }}", "a text becomes a number with | int or | float"),
        ("{{ a.upper }}", "upper is a function: call it with ()"),
        ("{{ bytes }}", "contains 1 byte of binary data"),
        ("x\n{{ a }}\n{{ meta.lable }}", "line 3: the object has no attribute 'lable'"),
        ("{{ lsit }}", "no column or field 'lsit'; did you mean 'list'?"),
    ],
)  # fmt: skip
def test_what_fails_for_a_row(text: str, words: str) -> None:
    row = {"a": "b", "list": [1], "bytes": b"\xff", "meta": {"label": 1}}
    with pytest.raises(BadRowError) as error:
        JinjaTemplate(text, "x.j2").render(row)
    assert "the template 'x.j2'" in str(error.value)
    assert words in str(error.value)
    assert row == {"a": "b", "list": [1], "bytes": b"\xff", "meta": {"label": 1}}


def test_a_column_can_have_the_name_of_a_function() -> None:
    row = {"range": "wide", "row": "first"}
    assert JinjaTemplate('{{ range }} {{ row["row"] }}').render(row) == "wide first"
    assert Expression('range == "wide" and row.row == "first"').value(row) is True
    for text in ("{{ row }}", "{% for name in row %}{{ name }}{% endfor %}"):
        template = JinjaTemplate(text)
        template.check(["a"], "the table")
        with pytest.raises(InputError, match="is the whole row, but the table also has a column"):
            template.check(["row"], "the table")


DEEP = f"{'(' * 5000}a{')' * 5000}"


@pytest.mark.parametrize(
    "text", [f"{'{% if a %}' * 300}{{{{ a }}}}{'{% endif %}' * 300}", f"{{{{ {DEEP} }}}}"]
)
def test_a_template_that_is_nested_too_deeply_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        JinjaTemplate(text)


def test_an_expression_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        Expression(DEEP)


def test_a_failed_row_does_not_count_for_the_next() -> None:
    template = JinjaTemplate("{% for i in range(n) %}{% endfor %}{{ n }}")
    for _ in range(3):
        assert template.render({"n": 60_000}) == "60000"
        with pytest.raises(BadRowError):
            template.render({"n": 100_001})


def test_missing_columns_are_refused_with_the_nearest_name() -> None:
    template = JinjaTemplate('{{ txet }}{{ row["First nme"] }}{{ other | default("") }}')
    with pytest.raises(InputError) as error:
        template.check(["text", "First name"], "the input")
    assert "names 'txet', 'First nme', but the input has no such column" in refused(error)
    assert "did you mean 'text'?" in refused(error)
    template.check(["txet", "First nme"], "the input")


@pytest.mark.parametrize(
    ("text", "row", "value"),
    [
        ('score > 3 and label == "yes"', {"score": 4, "label": "yes"}, True),
        ('score > 3 and label == "yes"', {"score": 4, "label": "no"}, False),
        ("score | int > 3", {"score": "4"}, True),
        ('row["a b"] | length', {"a b": "xyz"}, 3),
        ("result", {"result": [1]}, [1]),
        ("'}}' in a", {"a": "{{ }}"}, True),
        ("a if b", {"a": 1, "b": False}, None),
        ("lacking is defined and lacking > 3", {}, False),
        ("answers[0].text", {"answers": [{"text": "t"}]}, "t"),
    ],
)
def test_the_value_of_an_expression(text: str, row: dict[str, Any], value: Any) -> None:
    assert Expression(text).value(row) == value


def test_the_names_of_an_expression() -> None:
    assert Expression('score > 3 and row["a b"] and x is defined').names == ("score", "a b", "x")
    with pytest.raises(InputError, match="names 'score'"):
        Expression("score > 3").check(["scores"], "the input")


@pytest.mark.parametrize("text", ["", "a >", "a }} {{ b", "a %}", "a b", "{{ a }}", "''.__class__"])
def test_an_invalid_expression_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="the expression"):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("score > 3", "no column or field 'score'; did you mean 'scores'?"),
        ("score", "no column or field 'score'"),
        ("scores.x", "the object has no attribute 'x'"),
        ("scores > 3", "'>' not supported"),
        ("9 ** 9999", "too large"),
    ],
)
def test_an_expression_that_fails_for_a_row(text: str, words: str) -> None:
    with pytest.raises(BadRowError) as error:
        Expression(text).value({"scores": {}})
    assert f"the expression '{text}': " in str(error.value)
    assert words in str(error.value)


@given(texts)
def test_no_value_becomes_a_part_of_an_expression(value: str) -> None:
    assert Expression("a").value({"a": value}) == value


@pytest.mark.parametrize("name", ["text.0", "text.length", "list.9", "list.x", "meta.lacking"])
def test_a_text_has_no_fields(name: str) -> None:
    with pytest.raises(KeyError):
        cell({"text": "abc", "list": ["d"], "meta": {"a": None}}, name)


def test_a_field_inside_a_cell() -> None:
    row = {"text": "abc", "list": ["d", ("e",)], "meta": {"a": None, "b": {"c": 1}}, "text.0": "f"}
    found = [cell(row, name) for name in ("list.0", "list.1.0", "meta.b.c", "meta.a.x", "text.0")]
    assert found == ["d", "e", 1, None, "f"]
