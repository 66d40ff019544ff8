"""The table: one line for each of teacher, controls and methods, the same text from the same file."""

import json

from limbeck.report import columns, markdown_table, rows


def test_lines_and_cells(comparison):
    lines = rows(comparison)
    assert [line[0] for line in lines] == ["teacher", "No teacher", "Label smoothing", "KD", "DKD", "DIST"]
    assert all(len(line) == len(columns(comparison)) for line in lines)
    cells = dict(zip(columns(comparison), lines[3], strict=True))
    assert cells["accuracy %"].startswith("95.3 ± ")
    assert cells["vs best control"].startswith("+4.1 (+")
    assert lines[3][3] == "gain"
    assert lines[2][3] == "best control"
    assert lines[1][3] == "control"


def test_markdown_is_made_of_the_file_alone(comparison):
    text = markdown_table(json.loads(json.dumps(comparison)))
    assert text == markdown_table(comparison)
    lines = text.splitlines()
    assert all(line.count("|") == len(columns(comparison)) + 1 for line in lines[:8])
    assert comparison["command"] in text
    assert "359 test samples" in text


def test_a_bar_in_a_name_does_not_break_the_table(comparison):
    comparison["methods"][2]["name"] = "KD (a|b)"
    assert "KD (a\\|b)" in markdown_table(comparison)


def test_operations_stand_there_where_they_were_counted(comparison):
    assert "operations" not in columns(comparison)
    for row in comparison["methods"]:
        row["operations"] = {"total": 3.21e12, "teacher": 1e12}
    cells = dict(zip(columns(comparison), rows(comparison)[3], strict=True))
    assert cells["operations"] == "3.21 T"
    assert all(len(line) == len(columns(comparison)) for line in rows(comparison))
    lines = markdown_table(comparison).splitlines()
    assert all(line.count("|") == len(columns(comparison)) + 1 for line in lines[:8])
