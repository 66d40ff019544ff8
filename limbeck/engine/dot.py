"""The distillation-oriented trainer (DOT): SGD with one momentum for the task and a larger one for the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_TASK, _DISTILL = "momentum_buffer", "distill_momentum_buffer"


class DOT(Optimizer):
    r"""SGD with the gradients of two losses, each with its momentum.

    .. math::
        v_\mathrm{task} &\leftarrow (\mu - \Delta)\, v_\mathrm{task} + \nabla L_\mathrm{task} + \lambda \theta \\
        v_\mathrm{distill} &\leftarrow (\mu + \Delta)\, v_\mathrm{distill} + \nabla L_\mathrm{distill} \\
        \theta &\leftarrow \theta - \eta\, (v_\mathrm{task} + v_\mathrm{distill})

    The paper finds the distillation loss the one that is not optimised enough, and helps it along. A parameter that
    only one of the losses reaches (a projector) has the momentum :math:`\mu`, and decays in any case.

    In a recipe: ``train: {optimizer: dot}``. The engine then takes both gradients apart: those of terms that are
    controls (``cross_entropy``) are the task's, all others the teacher's. In a loop of one's own::

        loss_distill.backward(retain_graph=True)
        optimizer.take_distill()
        loss_task.backward()
        optimizer.step()

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate :math:`\eta`.
        momentum: :math:`\mu`; 0.9.
        delta: :math:`\Delta`; the authors' 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on ImageNet. With 0 it is SGD.
        weight_decay: :math:`\lambda`.

    Raises:
        ValueError: A setting that cannot be.

    Source:
        Zhao et al., "DOT: A Distillation-Oriented Trainer", 2023, arXiv 2307.08436. Numbers equal to those of
        megvii-research/mdistiller@a08d46f, which leaves out the first decay of what only the teacher reaches.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DOT([weight], lr=0.1, momentum=0.5, delta=0.25)
        >>> for _ in range(2):
        ...     (2 * weight).sum().backward(); optimizer.take_distill()
        ...     weight.sum().backward(); optimizer.step(); optimizer.zero_grad()
        >>> weight  # 1 - 0.1 (1 + 2) - 0.1 (1.25 + 3.5)
        Parameter containing:
        tensor([0.2250], requires_grad=True)
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError("lr and weight_decay are not below zero")
        if not 0 <= delta <= momentum or momentum + delta >= 1:
            raise ValueError("momentum - delta is not below 0, and momentum + delta is below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self._distill: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def take_distill(self) -> None:
        """Take the gradients that stand at the parameters as those of the distillation loss, and clear them."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.add_distill(parameters, [p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None

    def add_distill(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add to the gradients of the distillation loss that the next step uses."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                known = self._distill.get(parameter)
                self._distill[parameter] = gradient if known is None else known + gradient

    def gradients(self) -> list[Tensor]:
        """The gradient of the sum of both losses, parameter by parameter."""
        found = []
        for group in self.param_groups:
            for p in group["params"]:
                parts = [g for g in (p.grad, self._distill.get(p)) if g is not None]
                if parts:
                    found.append(sum(parts[1:], parts[0]))
        return found

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients of both losses, as clipping does."""
        tensors = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_([*tensors, *self._distill.values()], factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; the distillation gradients are used up."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            own = {p: p.grad for p in group["params"] if p.grad is not None}
            other = {p: self._distill[p] for p in group["params"] if p in self._distill}
            for decays, reached, beside, name, sign in (
                (True, own, other, _TASK, -1),
                (False, other, own, _DISTILL, 1),
            ):
                both = [p for p in reached if p in beside]
                alone = [p for p in reached if p not in beside]
                self._move(both, reached, name, group["momentum"] + sign * group["delta"], group, decays)
                self._move(alone, reached, name, group["momentum"], group, True)
        self._distill.clear()
        return loss

    def _move(
        self,
        parameters: list[nn.Parameter],
        gradients: dict[nn.Parameter, Tensor],
        name: str,
        momentum: float,
        group: dict[str, Any],
        decays: bool,
    ) -> None:
        """Move parameters by one of their two velocities."""
        if not parameters:
            return
        weights: list[Tensor] = [*parameters]
        found = [gradients[p] for p in parameters]
        if decays and group["weight_decay"]:
            found = list(torch._foreach_add(found, weights, alpha=group["weight_decay"]))
        velocities = [self.state[p].setdefault(name, torch.zeros_like(p)) for p in parameters]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, found)
        torch._foreach_add_(weights, velocities, alpha=-group["lr"])
