"""What a comparison is said to show follows from its intervals, and from nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report.words import cautions, count, findings, interval, number, percent, plus_minus, signed, verdict
from tests.report.facts import ACCURACY, facts_of


def test_each_verdict_has_its_sentence(comparison):
    gain, loss, rest = findings(comparison)
    assert gain.startswith("KD gains 4.1 points over the best control, Label smoothing (95% interval +")
    assert loss.startswith("DIST loses 6.0 points to the best control, Label smoothing (95% interval −")
    assert rest.startswith("Within noise of the best control, Label smoothing, over 3 seeds: DKD +0.1 (−")
    assert "gain" not in rest


def test_one_seed_and_no_controls_allow_no_gain():
    one = facts_of({name: values[:1] for name, values in ACCURACY.items()})
    assert findings(one) == ["One seed tells nothing of how results vary, so no difference here is called a gain."]
    assert all(verdict(row["gain"]) in ("", "one seed") for row in one["methods"])
    bare = facts_of({"kd": ACCURACY["kd"]})
    assert "no controls" in findings(bare)[0]


def test_cautions_say_what_intervals_do_not_cover(comparison):
    text = " ".join(cautions(comparison))
    assert "Student's t over 3 seeds" in text
    assert "by chance" in text
    comparison["data"]["split"] = "validation"
    comparison["left_out"] = {"same_budget": "it would take 431 times the steps of the others"}
    text = " ".join(cautions(comparison))
    assert "no test split" in text
    assert "same_budget was left out: it would take 431 times" in text


@given(st.floats(-1, 1, allow_nan=False), st.integers(0, 3))
def test_signs_are_never_lost(value, digits):
    text = signed(value, digits)
    shown = float(text.replace("−", "-"))
    assert shown == pytest.approx(100 * value, abs=0.51 * 10**-digits)
    assert text[0] in "+−" or shown == 0
    assert "-" not in text


@given(st.floats(1, 1e15))
def test_counts_keep_three_digits(value):
    text = count(value)
    size = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.split()[0]) * size == pytest.approx(value, rel=0.006, abs=0.51)


def test_numbers_that_are_not_there():
    assert number(None) == number(float("nan")) == percent(None) == count(None) == plus_minus(None, 1) == "–"
    assert interval({"interval": None}, 1) == ""
    assert interval({"interval": [-0.2, 1.3]}, 1) == "0.0 to 100.0"
    assert plus_minus({"mean": 0.5, "interval": None}, 1) == "50.0"
