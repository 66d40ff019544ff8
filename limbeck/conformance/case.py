"""One objective in one setting: everything a check works with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance.scene import Scene, drawing, evaluate, reseed, tensors_of
from limbeck.conformance.settings import Setting
from limbeck.conformance.subject import Subject
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import LimbeckError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.survey import dry
from limbeck.core.taps import Listener
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.core.trace import Trace
from limbeck.models.heads import fit_head
from limbeck.teachers.several import SeveralTeachers


class Case:
    """One subject in one setting. The same seed makes the same things."""

    def __init__(self, subject: Subject, setting: Setting) -> None:
        self.subject, self.setting = subject, setting
        self._scenes: dict[bool, Scene] = {}

    @cached_property
    def contract(self) -> Contract:
        """What the objective promises."""
        return self.subject.make().contract

    @property
    def teacherless(self) -> bool:
        """The objective asks nothing of a teacher."""
        return not self.subject.make().teacher_taps

    def models(self, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """Student and teacher; the teacher is the same for every seed. The student has the head its method wants."""
        reseed(seed)
        student = self.setting.student()
        reseed(-1)
        teacher = self.setting.teacher()
        fit_head(student, [self.subject.make()], example=self.batch(), teacher=teacher)
        return student, teacher

    def batch(self, seed: int = 0) -> Batch:
        """A batch; in the suite's own settings with labels and ids, without a mask."""
        return self.setting.batch(seed)

    def scene(self, *, dtype: torch.dtype = torch.float64, twins: bool = False) -> Scene:
        """Both models' traces of a batch, as plain tensors; ``twins``: the teacher is the student's double."""
        if twins not in self._scenes:
            objective = self.subject.make()
            student, teacher = self.models()
            teacher = _twin(student, teacher) if twins else teacher
            batch = self.batch()
            if twins and batch.teacher_inputs is not None:  # who agrees has seen the same
                batch = batch.replace(teacher_inputs=None, extras={})
            batch = objective.prepare(batch)
            said = Trace(None)
            if objective.teacher_taps:
                frozen = _frozen(teacher)
                frozen.attach(objective.teacher_taps, batch)
                said = frozen(batch).detach()
            self._scenes[twins] = Scene(_listen(student, objective.student_taps, batch), said, batch)
        return copy.deepcopy(self._scenes[twins]).cast(dtype)

    def objective(
        self,
        scene: Scene | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        options: Mapping[str, Any] | None = None,
    ) -> Objective:
        """A fresh objective, set up on a scene and then cast."""
        scene = scene or self.scene()
        if any(t.dtype == torch.float64 for t in tensors_of(scene.student)):
            scene = scene.cast(torch.float32)  # what setup makes is float32
        reseed(seed)
        objective = self.subject.make(**(options or {}))
        objective.setup(scene.student, scene.teacher, scene.batch, self.data)
        return objective.to(dtype)

    def distiller(self, seed: int = 0) -> Distiller:
        """Models and objective together, set up."""
        student, teacher = self.models(seed)
        reseed(seed)
        objective = self.subject.make()
        distiller = Distiller(student, objective, _frozen(teacher) if objective.teacher_taps else None)
        return distiller.setup(self.batch(seed), self.setting.data)

    @cached_property
    def data(self) -> DataInfo:
        """What is told of the training set, with what the teacher says of it."""
        taps, batches = self.subject.make().teacher_taps, self.setting.data.batches
        if batches is None or not taps:
            return self.setting.data

        def answers() -> Iterator[tuple[Trace, Batch]]:
            teacher = _frozen(self.models()[1])
            teacher.attach(taps, self.batch())
            return ((teacher(batch), batch) for batch in batches())

        return replace(self.setting.data, answers=answers)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The positions of a sample, where the objective looks at something by position; else none."""
        wanted, tensors = self.setting.places, tensors_of(self.scene().student)
        by_position = any(tuple(t.shape[1 : 1 + len(wanted)]) == wanted for t in tensors)
        maps = any(t.ndim == 4 and tuple(t.shape[2:]) == wanted * 2 for t in tensors)
        return wanted if by_position or maps else ()

    @cached_property
    def mask(self) -> Tensor:
        """Which places count: all of the first sample's, none of the last's, some of the others'.

        By position where the objective takes such masks, else by sample; as ``prepare`` hands it on with the batch.
        """
        mask = torch.rand(self.batch().size, *self.places, generator=torch.Generator().manual_seed(3)) < 0.7
        mask[0], mask[-1] = True, False
        scene = self.scene()
        try:
            evaluate(self.objective(scene), scene.change(mask=self._prepared(mask)))
        except LimbeckError:
            return self._prepared(mask.reshape(len(mask), -1).any(dim=1))
        return self._prepared(mask)

    def _prepared(self, mask: Tensor) -> Tensor:
        with drawing():
            prepared = self.subject.make().prepare(self.batch().replace(mask=mask)).mask
        return mask if prepared is None else prepared


def _frozen(teacher: nn.Module) -> Teacher:
    return SeveralTeachers(teacher) if isinstance(teacher, nn.ModuleList) else FrozenTeacher(teacher)


def _twin(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """The student's double in the teacher's place, or in that of each teacher."""
    if not isinstance(teacher, nn.ModuleList):
        return copy.deepcopy(student)
    return nn.ModuleList(copy.deepcopy(student) for _ in teacher)


def _listen(model: nn.Module, taps: tuple[str, ...], batch: Batch) -> Trace:
    listener = Listener(model, taps, batch.inputs)
    try:
        with dry(model):
            return listener(batch.inputs).detach()
    finally:
        listener.close()
