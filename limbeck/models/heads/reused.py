"""A projector into the teacher's feature space, and the teacher's own classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, LimbeckError, ModelError, TapError
from limbeck.core.reduction import widen
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import Place
from limbeck.models.heads.plan import Head, Plan, Site, exchange, looked, set_module


class ReusedHead(Head):
    """A projector of the pooled feature, and the teacher's classifier."""

    def __init__(self, projector: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.projector, self.classifier = projector, classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.projector(x))


class Projected(Head):
    """The module that makes a model's last map, with a projector behind it: before pooling, wherever that happens."""

    def __init__(self, body: nn.Module, projector: nn.Module, size: list[int] | None) -> None:
        super().__init__()
        self.body, self.projector = body, projector
        self.pool = nn.Identity() if size is None else nn.AdaptiveAvgPool2d((size[0], size[1]))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.projector(self.pool(self.body(*args, **kwargs)))


class _Rows(nn.Sequential):
    """Layers on ``[*, D]``, all positions taken as samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 2 else super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Reused(Plan):
    """SimKD's head, arXiv 2203.14001: a projector, and the teacher's classifier, which does not train.

    The projector is three convolutions (1x1, 3x3, 1x1), each with batch normalisation and ReLU.

    Args:
        layer: See :class:`Plan`.
        feature: What is projected: ``"map"``, the last map before it is averaged, as in the paper; or ``"pooled"``,
            what enters the last linear layer, for transformers and whatever else has no such map. The convolutions are
            linear layers then.
        width: Of the teacher's feature.
        after: The module behind which the projector of maps stands; default the last that gives a map.
        size: Height and width to which the student's map is averaged first; default the teacher's, where smaller.
        relu: End with a ReLU; default where the teacher's feature is never negative.
        factor: How many times narrower than the teacher's feature it is inside. 2 in the paper.
        depthwise: The 3x3 convolution sees one channel at a time, as in the paper's smallest projectors.
    """

    name: ClassVar[str] = "reused"
    feature: Literal["map", "pooled"] = "map"
    width: int | None = None
    after: str | None = None
    size: list[int] | None = None
    relu: bool | None = None
    factor: int = 2
    depthwise: bool = False

    def put(self, site: Site) -> None:
        plan, weight, bias = self._settled(site)
        assert plan.width is not None
        if plan.factor < 1 or plan.width < plan.factor:
            raise ConfigError("wrong number", where="head.factor", found=plan.factor, wanted=f"1 to {plan.width}")
        classifier = nn.Linear(plan.width, site.linear.out_features).to(site.linear.weight.dtype)
        if weight is not None and bias is not None:
            with torch.no_grad():
                classifier.weight.copy_(weight)
                classifier.bias.copy_(bias)
        classifier.requires_grad_(False)
        middle, relu = plan.width // plan.factor, plan.relu is not False
        if plan.feature == "pooled":
            layers = [_rows(site.linear.in_features, middle), _rows(middle, middle), _rows(middle, plan.width, relu)]
            head = ReusedHead(_Rows(*(layer for part in layers for layer in part)), classifier)
            head.plan = plan
            exchange(site.model, site.layer, head, like=site.linear)
            return
        assert plan.after is not None
        groups = middle if plan.depthwise else 1
        parts = [_convolution(site.linear.in_features, middle, 1), _convolution(middle, middle, 3, groups)]
        parts.append(_convolution(middle, plan.width, 1, relu=relu))
        body = site.model.get_submodule(plan.after)
        projected = Projected(body, nn.Sequential(*(layer for part in parts for layer in part)), plan.size)
        projected.plan = plan
        exchange(site.model, plan.after, projected, like=site.linear)
        exchange(site.model, site.layer, classifier, like=site.linear)
        try:
            _check_pooling(site, plan.after)
        except BaseException:
            set_module(site.model, plan.after, body)
            set_module(site.model, site.layer, site.linear)
            raise

    def _settled(self, site: Site) -> tuple[Reused, Tensor | None, Tensor | None]:
        """Everything that was left open, and the teacher's classifier."""
        plan, weight, bias = self, None, None
        shape: tuple[int, ...] | None = None
        if site.teacher is not None:
            feature, weight, bias = _teacher_feature(site.teacher, site.teacher_inputs, self.feature)
            if plan.width not in (None, weight.shape[1]):
                message = "the teacher's feature has another width"
                raise ConfigError(message, where="head.width", found=plan.width, wanted=weight.shape[1])
            if weight.shape[0] != site.linear.out_features:
                raise ModelError(
                    "teacher and student tell different numbers of classes, so the classifier cannot be reused",
                    where="head.reused",
                    found=f"{weight.shape[0]} and {site.linear.out_features}",
                )
            relu = bool((feature >= 0).all()) if plan.relu is None else plan.relu
            plan, shape = replace(plan, width=weight.shape[1], relu=relu), tuple(feature.shape[2:])
        if plan.width is None:
            raise ConfigError(
                "the teacher's classifier is reused, and there is no teacher",
                where="head.reused",
                remedy="give the teacher, or the width of its feature: head: {reused: {width: 256}}",
            )
        if plan.feature == "map" and plan.after is None:
            if site.places is None:
                raise ConfigError("which module gives the last map is told by an example", where="head.after")
            place = _last_map(site)
            plan = replace(plan, after=place.name)
            own = place.shape or ()
            if shape and plan.size is None and own[2] > shape[0]:
                plan = replace(plan, size=list(shape))
        return plan, weight, bias


def _teacher_feature(teacher: nn.Module, inputs: Any, feature: str) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's feature before its classifier, as a map or pooled, and the classifier."""
    if inputs is None:
        raise ConfigError("what the teacher's feature is like is told by an example", where="head.reused")
    taps = ("penultimate", "logits@weight", "logits@bias", *(("stages:-1",) if feature == "map" else ()))
    try:
        trace = looked(teacher, inputs, taps)
    except TapError as error:
        raise _no_map("teacher", str(error)) from error
    pooled, weight, bias = trace["penultimate"], trace["logits@weight"], trace["logits@bias"]
    if feature == "pooled":
        return pooled, weight, bias
    found = trace["stages:-1"]
    if not _averages(found, pooled):
        raise _no_map("teacher", f"{list(found.shape)} and {list(pooled.shape)}")
    return found, weight, bias


def _averages(feature: Tensor, pooled: Tensor) -> bool:
    """Whether what enters the classifier is the mean of a map."""
    if feature.ndim != 4 or feature.shape[:2] != pooled.shape:
        return False
    mean = widen(feature).mean(dim=(2, 3))
    return torch.allclose(mean, widen(pooled), rtol=1e-3, atol=1e-3 * float(mean.abs().max()))


def _no_map(whose: str, found: str) -> ModelError:
    return ModelError(
        f"what enters the {whose}'s last layer is not the mean of its last map",
        where="head.reused",
        found=found,
        remedy="project what enters it: head: {reused: {feature: pooled}} and simkd: {feature: pooled}",
    )


def _last_map(site: Site) -> Place:
    """The module that finishes last among those that give the student's last map, and give it as it is."""
    assert site.places is not None
    try:
        spot = resolve("stages:-1", site.places)
    except TapError as error:
        raise _no_map("student", str(error)) from error
    assert isinstance(spot, Spot)
    shape = site.places[spot.module].shape or ()
    alike = [p for p in site.places.values() if p.plain and p.shape == shape and p.calls == 1 and p.name != "."]
    if len(shape) != 4 or shape[1] != site.linear.in_features or not alike:
        raise _no_map("student", f"{list(shape)} before a layer of {site.linear.in_features} features")
    return max(alike, key=lambda p: p.order)


def _check_pooling(site: Site, after: str) -> None:
    """See that the classifier is given the mean of what the projector gives."""
    if site.inputs is None:
        return
    try:
        trace = looked(site.model, site.inputs, (after, f"{site.layer}@in"))
    except LimbeckError:
        raise
    except Exception as error:  # whatever the model does behind its last map, it does not take other channels
        first = "".join(str(error).strip().splitlines()[:1])
        raise _no_map("student", f"{type(error).__name__}: {first}") from error
    if not _averages(trace[after], trace[f"{site.layer}@in"]):
        raise _no_map("student", f"{list(trace[after].shape)} and {list(trace[f'{site.layer}@in'].shape)}")


def _convolution(channels: int, width: int, kernel: int, groups: int = 1, relu: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False, groups=groups)
    return [conv, nn.BatchNorm2d(width), *([nn.ReLU()] if relu else [])]


def _rows(features: int, width: int, relu: bool = True) -> list[nn.Module]:
    return [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), *([nn.ReLU()] if relu else [])]
