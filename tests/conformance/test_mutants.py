"""The suite itself: sound objectives pass, and each fault is named by the check meant for it, and by no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from limbeck.conformance.models import ImageClassifier
from limbeck.conformance.settings import images
from limbeck.conformance.suite import Suite
from limbeck.core import catalogue
from limbeck.core.objective import Objective
from limbeck.core.reduction import Reduction, reduce
from limbeck.testing import checks
from tests.conformance import sound
from tests.conformance.mutants import CARD, DOCUMENTED, MEANT, MUTANTS, SETTING, PutsTheStudentInEval

COSTLY = ("compiled",)


def failed(suite: Suite, setting: str, meant: str) -> list[str]:
    """The checks that fail in one setting; what costs most is run only where it is meant."""
    suite.cases = [c for c in suite.cases if c.setting.name == setting]
    for check in checks():
        if check.name not in COSTLY or check.name == meant:
            suite.run(check)
    return suite.report.failed


@pytest.mark.parametrize(
    "cls", [sound.Response, sound.Gap, sound.Hint, sound.Views, sound.Labels], ids=lambda c: c.__name__
)
def test_sound_objectives_pass(cls: type[Objective]) -> None:
    suite = Suite(cls)
    for check in checks():
        suite.run(check)
    assert suite.report.failed == [], str(suite.report)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "PutsTheStudentInEval"])
def test_each_mutant_is_caught_by_the_check_meant_for_it(name: str) -> None:
    suite = Suite(MUTANTS[name])
    assert failed(suite, SETTING[name], MEANT[name]) == [MEANT[name]], str(suite.report)


def test_a_student_put_into_evaluation_mode_is_noticed() -> None:
    def student() -> nn.Module:
        PutsTheStudentInEval.student = ImageClassifier(4, 1, 5)
        return PutsTheStudentInEval.student

    suite = Suite(
        PutsTheStudentInEval, student=student, teacher=lambda: ImageClassifier(6, 2, 5), batch=images().batch(0)
    )
    assert failed(suite, "given", "models_untouched") == ["models_untouched"], str(suite.report)


def function(wrong: str) -> Callable[..., Tensor]:
    """The mutant's pure function, with a fault."""

    def mutant_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 4.0,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        r""":math:`x`. Source: none.

        >>> 1
        1
        """
        values = sound.Response(4.0 if wrong == "function" else temperature).values(student_logits, teacher_logits)
        if wrong == "reductions" and reduction == "sum":
            return reduce(values, mask)
        return reduce(values, mask, reduction)

    return mutant_loss


@pytest.mark.parametrize("wrong", ["function", "reductions", "nothing"])
def test_a_function_that_differs_from_its_objective_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Carded(sound.Response):
        __doc__ = DOCUMENTED
        card = CARD

    method = catalogue.Method(CARD, Carded, function(wrong), {})
    monkeypatch.setitem(catalogue._methods, CARD.key, method)
    suite = Suite(CARD.key, options={"temperature": 2.0})
    assert failed(suite, "tokens", wrong) == ([] if wrong == "nothing" else [wrong]), str(suite.report)


def test_every_check_has_a_mutant() -> None:
    assert {*MEANT.values(), "function", "reductions"} - {"runs"} == {c.name for c in checks()}
