"""What a trainer's user may give as the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective, Terms
from limbeck.models.heads.wanted import wanted_head
from limbeck.recipes.build import loss_of
from limbeck.recipes.schema import Weighted, usual_terms

LossSpec = str | Mapping[str, Any] | Objective | Terms
_TERMS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Weighted])


def as_terms(loss: LossSpec, task: str = "classification") -> Terms:
    """A method's name, a recipe's ``loss`` as a dict, an objective or a sum of them, as that sum.

    Args:
        loss: A name stands for the sum that its card calls usual; a dict has weights, or options with a weight.
        task: What labels mean: of a bare name, the loss on labels beside it is the task's.

    Raises:
        ConfigError: No such method, option or weight, or a loss that wants another last layer of its student.

    >>> as_terms("kd").names, as_terms({"cross_entropy": 0.5, "jsd": {"weight": 0.5, "beta": 0.1}}).names
    (['cross_entropy', 'kd'], ['cross_entropy', 'jsd'])
    """
    if isinstance(loss, str):
        found = loss_of(usual_terms(loss, task))
    elif isinstance(loss, Mapping):
        found = loss_of(_terms(loss))
    else:
        found = Terms.of(loss)
    head = wanted_head(found)
    if head is not None:
        raise ConfigError(
            "this loss wants another last layer of its student",
            where="loss",
            found=", ".join(found.names),
            wanted=f"the head {next(iter(head))!r}",
            remedy="train with limbeck.distill, which puts it on and saves it",
        )
    return found


def _terms(loss: Mapping[str, Any]) -> dict[str, Any]:
    if not loss:
        raise ConfigError("there is no term", where="loss", wanted="{method: weight}")
    try:
        return _TERMS.validate_python(dict(loss))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(["loss", *map(str, first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(message[0].lower() + message[1:], where=place, found=repr(first["input"])) from None
