"""What a comparison is said to show follows from its intervals, and from nothing else."""

from limbeck.report.sentences import cautions, findings, verdict
from tests.report.facts import ACCURACY, facts_of

PERPLEXITY = {"no_teacher": [9.0, 9.1, 9.2], "label_smoothing": [9.4, 9.5, 9.6], "kd": [8.5, 8.58, 8.71]}


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


def test_where_less_is_better_a_gain_is_below():
    facts = facts_of({**PERPLEXITY, "dist": [9.6, 9.69, 9.81]}, "perplexity", lower=True)
    gain, loss = findings(facts)
    assert facts["best_control"] == "no_teacher"
    assert gain.startswith("A gain: the perplexity of KD is 0.50 below that of the best control, No teacher (95% int")
    assert loss.startswith("A loss: the perplexity of DIST is 0.60 above that of the best control, No teacher")
    assert "cut at 0 and 100" not in " ".join(cautions(facts))
    assert "cut at 0 and 100" in " ".join(cautions(facts_of(ACCURACY)))
