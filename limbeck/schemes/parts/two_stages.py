"""Two stages of one training: how their lengths are shared, and the task that is learned in the second one."""

from __future__ import annotations

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.roles import resolve
from limbeck.core.survey import survey
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import Cast


def two_configs(config: TrainConfig, share: float) -> tuple[TrainConfig, TrainConfig]:
    """The settings of both stages; lengths, of one at least, add up to the whole.

    Args:
        config: Of the whole.
        share: Of the first stage.

    Raises:
        ConfigError: There is but one epoch or step.

    >>> [part.epochs for part in two_configs(TrainConfig(epochs=10), 0.25)]
    [2, 8]
    """
    name = "steps" if config.steps is not None else "epochs"
    whole = getattr(config, name)
    if whole < 2:
        raise ConfigError(f"two stages need two {name} or more", where=f"train.{name}", found=whole)
    first = min(max(round(whole * share), 1), whole - 1)
    return (
        config.model_copy(update={name: first, "monitor": "total"}),
        config.model_copy(update={name: whole - first}),
    )


def task_stage(cast: Cast, then: str, config: TrainConfig) -> Stage:
    """The recipe's own loss after features were learned: ``"probe"`` moves the last layer alone, else all learn.

    Raises:
        ConfigError: A probe has no data to find the last layer by.
    """
    learn = ("*",)
    if then == "probe":
        if cast.train is None:
            raise ConfigError("there is nothing to learn from", where="train")
        spot = resolve("penultimate", survey(cast.student, cast.train.example(2).inputs, cast.logits))
        learn = (f"{spot.module}.*",)  # type: ignore[union-attr]  # one place
    return Stage(then, Distiller(cast.student, cast.loss, cast.teacher, logits=cast.logits), config, learn)
