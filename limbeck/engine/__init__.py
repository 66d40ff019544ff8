"""The loop: precision, compile, ranks, checkpoints, exact resume, trackers, progress.

Names are imported when they are first asked for, so that reading a recipe does not wait for accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.engine.config import TrainConfig
    from limbeck.engine.evaluation import evaluate, evaluate_loss
    from limbeck.engine.fitting import Fit, fit
    from limbeck.engine.stage import Stage
    from limbeck.engine.stopping import Stopped

__all__ = ["Fit", "Stage", "Stopped", "TrainConfig", "evaluate", "evaluate_loss", "fit"]

_HOMES = {
    "Fit": "fitting",
    "Stage": "stage",
    "Stopped": "stopping",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "evaluate_loss": "evaluation",
    "fit": "fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
