"""Checks that what does not fit is refused with a readable error that names the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import Scene, evaluate
from limbeck.core.errors import LimbeckError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace


@check(after=("value",))
def missing(case: Case) -> None:
    """Missing taps, labels, ids or facts about the data are named in an error; what the card does not need may lack."""
    scene = case.scene()
    objective = case.objective(scene)
    _refused(lambda: evaluate(objective, Scene(Trace(None), scene.teacher, scene.batch)), "a student without its taps")
    if not case.teacherless:
        _refused(
            lambda: evaluate(objective, Scene(scene.student, Trace(None), scene.batch)), "a teacher without its taps"
        )
    for name in ("labels", "index"):
        _needed(case, name, lambda name=name: _without(case, scene, name))  # type: ignore[misc]
    told = case.data
    _needed(case, "samples", lambda: _blank(case, scene, DataInfo(answers=told.answers, tokenizers=told.tokenizers)))
    _needed(
        case,
        "answers",
        lambda: _blank(case, scene, DataInfo(told.samples, told.labels, told.classes, tokenizers=told.tokenizers)),
    )


def _without(case: Case, scene: Scene, name: str) -> None:
    bare = scene.change(**{name: None})
    evaluate(case.objective(scene), bare)


def _blank(case: Case, scene: Scene, data: DataInfo) -> None:
    objective = case.subject.make()
    objective.setup(scene.student, scene.teacher, scene.batch, data)
    evaluate(objective.to(torch.float64), scene)


def _needed(case: Case, name: str, attempt: Callable[[], object]) -> None:
    """Refused by name where the card needs it, fine where the card does not; without a card either."""
    needed = case.subject.needs(name)
    try:
        attempt()
    except LimbeckError as error:
        require(needed is not False, f"without {name} it is refused, and the card's needs do not list it: {error}")
        require(name.rstrip("s") in str(error), f"without {name} the error does not name it: {error}")
    except Exception as error:
        raise Failure(f"without {name}: {type(error).__name__}: {_line(error)}") from error
    else:
        require(not needed, f"the card needs {name}, and it works without")


@check(after=("value", "missing"))
def misfits(case: Case) -> None:
    """Wrong shapes, dtypes and values are refused by name, never broadcast, never a bare error of torch."""
    scene = case.scene()
    objective = case.objective(scene)
    for what, changed, may_work in _misfits(case, scene):
        _refused(lambda changed=changed: evaluate(objective, changed), what, may_work)  # type: ignore[misc]


def _misfits(case: Case, scene: Scene) -> Iterator[tuple[str, Scene, bool]]:
    """What does not fit, and whether an objective may be able to deal with it."""
    size, batch = scene.batch.size, scene.batch

    def rows(number: int) -> Callable[[Tensor], Tensor]:
        return lambda t: t[:number] if t.shape[:1] == (size,) else t

    yield "a student's tensor of whole numbers", scene.change(lambda t: t.long()), False
    yield "a student's tensor without dimensions but samples", scene.change(_flat), False
    if not case.teacherless:
        yield "a teacher's tensor of whole numbers", scene.change(None, lambda t: t.long()), False
        yield "a teacher's tensor with a sample too few", scene.change(None, rows(size - 1)), False
        yield "a teacher's tensor of one sample", scene.change(None, rows(1)), False
    if "logits" in scene.student.taps and "logits" in scene.teacher.taps:
        yield "a teacher with another number of classes", _more_classes(scene), True
    if case.subject.needs("labels") and batch.labels is not None:
        yield "labels of a sample too few", scene.change(labels=batch.labels[:-1]), False
        if not batch.labels.is_floating_point() and case.setting.classes:
            yield "a label that names no class", scene.change(labels=batch.labels + case.setting.classes), False
    if case.subject.needs("index") and batch.index is not None:
        yield "ids of a sample too few", scene.change(index=batch.index[:-1]), False
        if case.setting.data.samples:
            yield "an id beyond the data", scene.change(index=batch.index + case.setting.data.samples), False


@check(lambda case: None if case.contract.mask else "it honours no mask", after=("value", "mask"))
def bad_mask(case: Case) -> None:
    """A mask that does not fit, or is not boolean, is refused."""
    scene = case.scene()
    objective = case.objective(scene)
    for what, mask in (
        ("a mask with a sample too many", torch.cat([case.mask, case.mask[:1]])),
        ("a mask that is not boolean", case.mask.double()),
    ):
        _refused(lambda mask=mask: evaluate(objective, scene.change(mask=mask)), what)  # type: ignore[misc]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).sum(1) if tensor.ndim > 1 else tensor.sum()


def _more_classes(scene: Scene) -> Scene:
    taps = dict(scene.teacher.taps)
    logits = scene.teacher.logits
    taps["logits"] = torch.cat([logits, logits[..., :2]], dim=-1)
    return Scene(scene.student, Trace(taps["logits"], taps), scene.batch)


def _refused(attempt: Callable[[], object], what: str, may_work: bool = False) -> None:
    try:
        attempt()
    except LimbeckError as error:
        require(error.where is not None, f"{what}: the error does not say where: {error}")
        return
    except Exception as error:
        raise Failure(f"{what}: {type(error).__name__}: {_line(error)}") from error
    require(may_work, f"{what} was accepted in silence")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
