"""Knowledge distillation for PyTorch: any teacher, any student, every method checked.

    student = limbeck.distill(teacher, student, data, "kd", epochs=30).student

Names are imported when they are first asked for: ``import limbeck`` itself takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck import (
        cache,
        compression,
        data,
        functional,
        integrations,
        kernels,
        models,
        objectives,
        recipes,
        schemes,
        teachers,
        testing,
    )
    from limbeck.analysis.assess import assess
    from limbeck.compression.surgery import student_from
    from limbeck.core.batch import Batch
    from limbeck.core.catalogue import Card, register
    from limbeck.core.distiller import Distiller, Losses
    from limbeck.core.errors import LimbeckError
    from limbeck.core.objective import Contract, DataInfo, Objective, Terms
    from limbeck.core.projectors import projector
    from limbeck.core.schedules import Constant, Cosine, Exponential, Linear, Schedule, Step, WarmUp
    from limbeck.core.taps import listen
    from limbeck.core.teacher import FrozenTeacher, Teacher
    from limbeck.core.trace import Trace
    from limbeck.data.build import as_loader
    from limbeck.engine.config import TrainConfig
    from limbeck.engine.evaluation import evaluate
    from limbeck.engine.fitting import Fit, Stage, fit
    from limbeck.models.load import load_model
    from limbeck.models.student import load_student
    from limbeck.models.weights import load_weights, save_weights
    from limbeck.recipes.distill import Distilled, distill
    from limbeck.teachers.cached import CachedTeacher
    from limbeck.teachers.routed import RoutedTeacher
    from limbeck.teachers.served import ServedTeacher

_HOMES = {
    "analysis.assess": ("assess",),
    "compression.surgery": ("student_from",),
    "core.batch": ("Batch",),
    "core.catalogue": ("Card", "register"),
    "core.distiller": ("Distiller", "Losses"),
    "core.errors": ("LimbeckError",),
    "core.objective": ("Contract", "DataInfo", "Objective", "Terms"),
    "core.projectors": ("projector",),
    "core.schedules": ("Constant", "Cosine", "Exponential", "Linear", "Schedule", "Step", "WarmUp"),
    "core.taps": ("listen",),
    "core.teacher": ("FrozenTeacher", "Teacher"),
    "core.trace": ("Trace",),
    "data.build": ("as_loader",),
    "engine.config": ("TrainConfig",),
    "engine.evaluation": ("evaluate",),
    "engine.fitting": ("Fit", "Stage", "fit"),
    "models.load": ("load_model",),
    "models.student": ("load_student",),
    "models.weights": ("load_weights", "save_weights"),
    "recipes.distill": ("Distilled", "distill"),
    "teachers.cached": ("CachedTeacher",),
    "teachers.routed": ("RoutedTeacher",),
    "teachers.served": ("ServedTeacher",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = (
    "cache",
    "compression",
    "data",
    "functional",
    "integrations",
    "kernels",
    "models",
    "objectives",
    "recipes",
    "schemes",
    "teachers",
    "testing",
)

__all__ = [
    "Batch",
    "CachedTeacher",
    "Card",
    "Constant",
    "Contract",
    "Cosine",
    "DataInfo",
    "Distilled",
    "Distiller",
    "Exponential",
    "Fit",
    "FrozenTeacher",
    "LimbeckError",
    "Linear",
    "Losses",
    "Objective",
    "RoutedTeacher",
    "Schedule",
    "ServedTeacher",
    "Stage",
    "Step",
    "Teacher",
    "Terms",
    "Trace",
    "TrainConfig",
    "WarmUp",
    "as_loader",
    "assess",
    "cache",
    "compression",
    "data",
    "distill",
    "evaluate",
    "fit",
    "functional",
    "integrations",
    "kernels",
    "listen",
    "load_model",
    "load_student",
    "load_weights",
    "models",
    "objectives",
    "projector",
    "recipes",
    "register",
    "save_weights",
    "schemes",
    "student_from",
    "teachers",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("limbeck")
    if name in _ROOMS:
        return importlib.import_module(f"limbeck.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"limbeck.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
