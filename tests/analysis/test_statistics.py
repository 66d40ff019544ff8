"""Intervals against scipy's tests, and what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from limbeck.analysis.statistics import compare_paired, summarise
from limbeck.core.errors import DataError

figures = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 4))


@given(
    st.lists(st.tuples(figures, figures), min_size=2, max_size=8).filter(
        lambda p: len({round(a - b, 9) for a, b in p}) > 1
    )
)
def test_paired_interval_and_verdict_are_those_of_the_paired_t_test(pairs):
    values, control = map(list, zip(*pairs, strict=True))
    facts = compare_paired(values, control)
    test = ttest_rel(values, control)
    interval = test.confidence_interval(0.95)
    assert facts["interval"] == pytest.approx([interval.low, interval.high], abs=1e-9)
    if abs(test.pvalue - 0.05) > 1e-9:
        assert (facts["verdict"] != "unclear") == (test.pvalue < 0.05)
    if facts["verdict"] != "unclear":
        assert facts["verdict"] == ("gain" if test.statistic > 0 else "loss")


def test_interval_of_a_mean_is_that_of_scipy():
    values = [0.81, 0.84, 0.79, 0.9]
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    facts = summarise(values)
    assert facts["interval"] == pytest.approx([interval.low, interval.high])
    assert facts["sd"] == pytest.approx(np.std(values, ddof=1))


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = summarise(rng.normal(0.7, 0.02, size=3).tolist())["interval"]
        hits += low <= 0.7 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_equal_seeds_alone_call_a_gain_in_at_most_one_case_of_forty():
    rng = np.random.default_rng(1)
    verdicts = [
        compare_paired(rng.normal(size=3).tolist(), rng.normal(size=3).tolist())["verdict"] for _ in range(2000)
    ]
    assert verdicts.count("gain") / 2000 < 0.04


def test_one_seed_or_no_spread_decides_nothing():
    assert compare_paired([0.9], [0.1]) == {"mean": 0.8, "sd": None, "interval": None, "n": 1, "verdict": "unclear"}
    assert compare_paired([0.9, 0.8, 0.7], [0.5, 0.4, 0.3])["verdict"] == "unclear"


def test_mistakes_are_named():
    with pytest.raises(DataError, match="no values"):
        summarise([])
    with pytest.raises(DataError, match="seed by seed"):
        compare_paired([1.0], [1.0, 2.0])
