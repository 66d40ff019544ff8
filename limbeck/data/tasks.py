"""What labels mean: a class a sample, any number of them, numbers, or tokens. Metrics and controls follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.core.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Task:
    """One meaning of labels.

    Args:
        labels: What they look like, for errors.
        headline: The metric that checkpoints are chosen and methods compared by.
        control: The objective that learns from labels alone.
        answers: The plainest objective that learns from a teacher's answers.
    """

    labels: str
    headline: str
    control: str
    answers: str


#: By name. It is a property of the data, said by the source: soft labels look like several of these.
TASKS: dict[str, Task] = {
    "classification": Task("[N] integers, or [N, C] soft labels", "accuracy", "cross_entropy", "kd"),
    "multilabel": Task(
        "[N, C] floating, 1 and 0 for yes and no, negative where unknown", "map_macro", "binary_cross_entropy", "mld"
    ),
    "regression": Task("[N, P] floating", "mse", "mse", "mse"),
    "language": Task("[B, L] integers, the token that each position predicts", "perplexity", "cross_entropy", "kd"),
}


def task_of(name: str) -> Task:
    """A task by name.

    >>> task_of("multilabel").headline
    'map_macro'
    """
    if name not in TASKS:
        remedy = did_you_mean(name, TASKS)
        raise DataError("no such task", where="task", found=repr(name), wanted=", ".join(TASKS), remedy=remedy)
    return TASKS[name]
