"""Checks of what stands beside the code: card, docstrings, and the pure function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import Scene, drawing, total
from limbeck.core import catalogue


def _cardless(case: Case) -> str | None:
    return "it has no card" if case.subject.card is None else None


@check(_cardless, once=True)
def card(case: Case) -> None:
    """The card says what, where from, when to use it, why its defaults, and on what evidence it is held right."""
    assert case.subject.card is not None
    written = case.subject.card
    empty = [n for n in ("key", "name", "title", "equation", "use") if not str(getattr(written, n)).strip()]
    require(not empty, f"the card has no {', '.join(empty)}")
    require(1900 < written.year < 2100, f"the card's year is {written.year}")
    if written.evidence == "reading":
        require(bool(written.choices), "evidence 'reading' lists the choices that were made")
    if written.evidence == "parity":
        require(bool(written.evidence_note), "evidence 'parity' names what was compared: repository and commit")
    unknown = [key for key in written.with_labels if key not in catalogue.methods()]
    require(not unknown, f"with_labels names {', '.join(unknown)}, which the catalogue does not have")
    cls = type(case.subject.make())
    text = f"{inspect.getdoc(cls) or ''}\n{inspect.getdoc(case.subject.function) if case.subject.function else ''}"
    options = [p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    bare = [o.name for o in options if o.default is o.empty]
    require(not bare, f"the options {', '.join(bare)} have no default")
    silent = [o.name for o in options if o.name not in written.defaults and f"{o.name}:" not in text]
    require(not silent, f"neither card.defaults nor a docstring says anything of {', '.join(silent)}")
    stale = [name for name in written.defaults if name not in {o.name for o in options}]
    require(not stale, f"card.defaults speaks of {', '.join(stale)}, which is no option")


@check(_cardless, once=True)
def documented(case: Case) -> None:
    """Formula, source and example stand in the docstring of the function, or of the class where there is none."""
    shown = case.subject.function or type(case.subject.make())
    text = inspect.getdoc(shown) or ""
    wanted = {
        "a formula": ".. math::" in text or ":math:" in text,
        "its source": "ource" in text,
        "an example": ">>>" in text,
    }
    lacking = [name for name, there in wanted.items() if not there]
    require(not lacking, f"the docstring of {shown.__name__} lacks {', '.join(lacking)}")


def _not_on_logits(case: Case) -> str | None:
    function = case.subject.function
    if function is None:
        return "it has no pure function"
    if case.batch().teacher_inputs is not None:
        return "the teacher reads other inputs, whose places the objective pairs first"
    if case.scene().teacher.members:
        return "it has several teachers"
    names = list(inspect.signature(function).parameters)
    return None if names[0] == "student_logits" else "its function does not start from logits"


@check(_not_on_logits, after=("value",))
def function(case: Case) -> None:
    """On raw logits its function gives what the objective gives."""
    scene = case.scene()
    if case.contract.mask:
        scene = scene.change(mask=case.mask)
    objective = case.objective(scene)
    found, wanted = _call(case, objective, scene), total(objective(scene.student, scene.teacher, scene.batch))
    require(
        torch.allclose(found, wanted, rtol=1e-9),
        f"the function gives {found.item():.8g}, the objective {wanted.item():.8g}",
    )


def _no_reduction(case: Case) -> str | None:
    reason = _not_on_logits(case)
    if reason is None and "reduction" not in inspect.signature(_function(case)).parameters:
        return "its function has no reduction"
    return reason


@check(_no_reduction, after=("value", "function"))
def reductions(case: Case) -> None:
    """Its function's "none" adds up to "sum", and "mean" is the sum over the places that count."""
    scene = case.scene()
    objective = case.objective(scene)
    places = tuple(scene.student.logits.shape[:-1])
    each, summed, mean = (_call(case, objective, scene, reduction=r) for r in ("none", "sum", "mean"))
    require(tuple(each.shape) == places, f"reduction='none' gives {list(each.shape)}, not {list(places)}")
    require(torch.allclose(each.sum(), summed, rtol=1e-9), "reduction='sum' is not the sum of 'none'")
    require(torch.allclose(summed / each.numel(), mean, rtol=1e-9), "reduction='mean' is not the mean of 'none'")


def _function(case: Case) -> Callable[..., Any]:
    assert case.subject.function is not None
    return case.subject.function


def _call(case: Case, objective: Any, scene: Scene, **more: Any) -> Tensor:
    """The pure function on the tensors it names, with the objective's own options."""
    given: dict[str, Any] = {
        "labels": scene.batch.labels,
        "mask": scene.batch.mask,
        "student_logits": scene.student.logits,
        "index": scene.batch.index,
        **scene.batch.extras,
    }
    if "logits" in scene.teacher.taps:
        given["teacher_logits"] = scene.teacher.logits
    known = inspect.signature(_function(case)).parameters
    options = {n: getattr(objective, n) for n in known if n not in given and hasattr(objective, n)}
    with drawing():
        return _function(case)(**{n: v for n, v in given.items() if n in known}, **options, **more)
