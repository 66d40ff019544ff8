"""Heads by name: put on a model, read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import check_options, options_of
from limbeck.core.errors import ConfigError, ModelError, did_you_mean
from limbeck.core.named import read_named
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import Place, survey
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.models.heads.dual import Dual
from limbeck.models.heads.plan import Head, Plan, Site, beside
from limbeck.models.heads.reused import Reused
from limbeck.models.heads.subclass import Subclass

PLAIN = "linear"  # the name for no other head

HeadSpec = str | Mapping[str, Mapping[str, Any] | None]

_KINDS: dict[str, type[Plan]] = {kind.name: kind for kind in (Subclass, Dual, Reused)}


def available_heads() -> list[str]:
    """The heads by name.

    >>> available_heads()
    ['dual', 'reused', 'subclass']
    """
    return sorted(_KINDS)


def put_head(model: nn.Module, head: HeadSpec, *, example: Any = None, teacher: Any = None) -> dict[str, Any]:
    """Put another head in the place of a model's last linear layer.

    The model is changed, not copied; its other weights stay. A model that has this head already is left as it is.

    Args:
        model: Any model with a linear layer at its end.
        head: A head's name, or ``{name: {option: value}}``; see :class:`Subclass`, :class:`Dual`, :class:`Reused`.
        example: Inputs of the model, or a ``Batch``: a dry run then tells which layer runs last. Without, it is the
            last that was registered.
        teacher: The model whose classifier is ``reused``.

    Returns:
        The head with everything settled, in a form that makes it again without example or teacher.

    Raises:
        ConfigError: No such head or option.
        ModelError: The model has no last linear layer, has another head already, or the teacher's does not fit.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> put_head(model, {"subclass": {"subclasses": 2}}, example=torch.zeros(1, 4))
    {'subclass': {'layer': '2', 'subclasses': 2, 'temperature': 2.0}}
    >>> model(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """
    name, options = read_named(head, "head")
    present = head_of(model)
    if name == PLAIN and not options and present is None:
        return {}
    plan = _plan(name, options)
    if present is not None:
        if present.keys() != {name} or any(present[name].get(k) != v for k, v in options.items() if v is not None):
            raise ModelError("the model has another head already", where="head", found=present, wanted={name: options})
        return present
    inputs, told = example, example
    if isinstance(example, Batch):
        inputs, told = example.inputs, teacher_inputs(example)
    teacher = teacher.model if isinstance(teacher, FrozenTeacher) else teacher
    if teacher is not None and not isinstance(teacher, nn.Module):
        teacher = None  # it answers, and has no layers to be looked at
    site = _site(model, plan, inputs, teacher, told)
    replace(plan, layer=site.layer).put(site)
    found = head_of(model)
    assert found is not None
    if site.places is not None:
        before, after = site.places["."].outputs, survey(model, beside(model, inputs))["."].outputs
        if before != after:
            message = "with this head the model gives something of another shape"
            raise ModelError(message, where="head", found=after, wanted=before)
    return found


def head_of(model: nn.Module) -> dict[str, Any] | None:
    """The head that was put on a model, as :func:`put_head` takes it; ``None`` where there is none.

    >>> head_of(nn.Linear(2, 2)) is None
    True
    """
    plans = (m.plan for m in model.modules() if isinstance(m, Head))
    return next((plan.written() for plan in plans if plan is not None), None)


def check_head(head: HeadSpec) -> None:
    """Refuse a head or an option that there is none of.

    >>> check_head({"subclass": {"sub": 3}})
    Traceback (most recent call last):
    limbeck.core.errors.ConfigError: head.subclass.sub: no such option; ...
    """
    name, options = read_named(head, "head")
    if name != PLAIN or options:
        _plan(name, options)


def kind_of(name: str) -> type[Plan]:
    """The head of this name, or an error that names near misses."""
    if name not in _KINDS:
        known = [*available_heads(), PLAIN]
        remedy = did_you_mean(name, known)
        raise ConfigError("no such head", where="head", found=repr(name), wanted=", ".join(known), remedy=remedy)
    return _KINDS[name]


def _plan(name: str, options: dict[str, Any]) -> Plan:
    kind = kind_of(name)
    return kind(**check_options(options_of(kind, name), options, f"head.{name}"))


def _site(model: nn.Module, plan: Plan, inputs: Any, teacher: nn.Module | None, told: Any) -> Site:
    places = None if inputs is None else survey(model, beside(model, inputs))
    layer = plan.layer or _last_linear(model, places)
    try:
        linear = model.get_submodule(layer)
    except AttributeError:
        remedy = did_you_mean(layer, [n for n, _ in model.named_modules()])
        raise ModelError("the model has no such module", where="head.layer", found=repr(layer), remedy=remedy) from None
    if not isinstance(linear, nn.Linear):
        found = f"{layer!r}, a {type(linear).__name__}"
        raise ModelError("a head stands in the place of a linear layer", where="head.layer", found=found)
    if linear is model:
        remedy = "put it into a torch.nn.Sequential"
        raise ModelError("the model is nothing but its last layer", where="head", remedy=remedy)
    return Site(model, layer, linear, places, inputs, teacher, told)


def _last_linear(model: nn.Module, places: dict[str, Place] | None) -> str:
    if places is None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    elif any(place.linear for place in places.values()):
        spot = resolve("penultimate", places)
        assert isinstance(spot, Spot)
        names = [spot.module.removeprefix(".")]
    else:
        names = []
    if not names:
        raise ModelError(
            "this model has no last linear layer that a head could replace",
            where="head",
            found=f"a {type(model).__name__}",
            remedy="use a method without a head, or a model that ends in torch.nn.Linear",
        )
    return names[-1]
