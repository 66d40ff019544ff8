"""YAML text to values with lines, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.recipes.document import dump, parse, parse_value
from limbeck.recipes.problem import Problem, RecipeError, dotted


def test_words_are_read_as_yaml_1_2_does() -> None:
    data = parse("a: [1e-4, on, yes, no, 010, 1:30, 2020-01-01, .5, 1., -3, ~, true, '1', <<, =]").data
    assert data["a"] == [1e-4, "on", "yes", "no", 10, "1:30", "2020-01-01", 0.5, 1.0, -3, None, True, "1", "<<", "="]


def test_every_value_knows_its_line() -> None:
    document = parse("a: 1\nb:\n  c: [1,\n    2]\n\n  d: {e: 3}\n")
    assert [document.line(k) for k in (("a",), ("b",), ("b", "c", 1), ("b", "d", "e"))] == [1, 2, 4, 6]


def test_what_was_not_written_stands_where_its_surroundings_do() -> None:
    document = parse("a: 1\nb:\n  c: 2\n")
    assert document.line(("b", "missing")) == 2
    assert document.line(("missing",)) is None


BROKEN = {
    "": "empty",
    "# nothing\n": "empty",
    "a: [1, 2": "no YAML",
    "a: 1\n\tb: 2": "no YAML",
    "a: 'open": "no YAML",
    "a: &x 1\nb: *x": "anchors",
    "a: *x": "anchors",
    "a: !!python/object/apply:os.system [ls]": "tags",
    "a: !!str 5": "tags",
    "- 1": "a recipe is a mapping",
    "just words": "a recipe is a mapping",
    "a: \x01": "cannot stand in YAML",
    "a: " + "[" * 5000: "nested too deeply",
    "a: " + "{b: " * 5000: "nested too deeply",
    "a: .inf": "not a number of any use",
    "a: .nan": "not a number of any use",
    "a: -1e999": "not a number of any use",
    "a: 9" + "0" * 6000: "not a number of any use",
    'a: "\\0"': "control characters",
    'a: "\\ud800"': "control characters",
    'a: "\\UFFFFFFFF"': "no YAML",
    "a: 1\n---\nb: 2": "one recipe",
    "? [1]\n: 2": "a key is a plain word",
    "a: " + "x" * 300_000: "too long",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda t: ascii(t[:20]))
def test_what_is_no_recipe_is_told_in_one_line(text: str) -> None:
    with pytest.raises(RecipeError, match=BROKEN[text]) as caught:
        parse(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert all(len(str(problem)) < 400 for problem in caught.value.problems)


def test_a_syntax_error_has_line_and_column() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: 1\nb: [1, 2\nc: 3\n")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (3, 2)


def test_all_keys_that_come_twice_are_told_with_both_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    problems = {p.where: p for p in caught.value.problems}
    assert (problems["a"].line, problems["a"].found) == (3, "first on line 1")
    assert problems["b.c"].line == 2


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    with pytest.raises(RecipeError, match="anchors"):
        parse(bomb)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e18, 1e18)
    | st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_ 1:", min_size=1), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=5), _plain, min_size=1, max_size=4))
def test_what_is_written_is_read_back(data: dict[str, object]) -> None:
    assert parse(dump(data)).data == data


@given(st.text(max_size=60))
def test_any_text_gives_a_document_or_a_recipe_error(text: str) -> None:
    problems: list[Problem] = []
    try:
        data = parse(text).data
    except RecipeError as error:
        problems, data = error.problems, {}
    assert problems or isinstance(data, dict)
    assert all(str(problem).encode() for problem in problems)


def test_one_value() -> None:
    assert parse_value("{linear: {start: 1}}", "--set") == {"linear": {"start": 1}}
    assert parse_value("", "--set") is None


def test_a_problem_says_where_what_and_how() -> None:
    problem = Problem("no such key", "a.b", 3, 7, found="'x'", wanted="y", remedy="drop it")
    assert str(problem) == "line 3, column 7: a.b: no such key; found 'x'; wanted y; drop it"
    assert dotted(("a", 1, "b", 2, 3)) == "a[1].b[2][3]"
