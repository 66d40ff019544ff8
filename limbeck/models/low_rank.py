"""Low-rank adapters: what a model learns is a small change of its linear layers, merged into them afterwards."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.reduction import check_positive

LEARNS = "*.parametrizations.weight.0.*"  # names of the parameters of adapters


class LowRank(nn.Module):
    r"""The change of one weight, :math:`W + \frac \alpha r B A`; B begins at zero.

    Args:
        weight: ``[C, D]``, that of the layer.
        rank: r.
        alpha: :math:`\alpha`.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def adapt(model: nn.Module, rank: int = 8, alpha: float = 16.0, layers: Iterable[str] = ("*",)) -> list[str]:
    """Put adapters on a model's linear layers but that of its logits; weights of layers are as before.

    While adapters are there, ``LEARNS`` fits the names of their parameters, and the state dict holds them. They are
    drawn from torch's random state.

    Args:
        model: Changed in place, until :func:`merge`.
        rank: Of the change of each weight.
        alpha: By alpha / rank it is multiplied.
        layers: Patterns over names of linear layers.

    Returns:
        Names of the layers.

    Raises:
        ModelError: No such layer, or one has an adapter.
        ConfigError: No such rank.

    Source: LoRA, arXiv 2106.09685.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> adapt(net, rank=2), sorted(name for name, _ in net.named_parameters() if "parametrizations.weight.0" in name)
    (['0'], ['0.parametrizations.weight.0.down', '0.parametrizations.weight.0.up'])
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError("must be a whole number, 1 or more", where="rank", found=repr(rank))
    check_positive(alpha, "alpha")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    last = head if head is not None else list(linear.values())[-1:]
    spare = {id(m) for m in (last if isinstance(last, list) else [last])}
    found = {n: m for n, m in linear.items() if id(m) not in spare and any(fnmatch.fnmatch(n, p) for p in layers)}
    if not found:
        raise ModelError(
            "this model has no such linear layers",
            where="layers",
            found=f"{len(linear)} linear layers of {type(model).__name__}",
            remedy="train all of it: rank 0",
        )
    for name, module in found.items():
        if parametrize.is_parametrized(module):
            raise ModelError("this layer has an adapter already", where=name, remedy="merge it first")
    for module in found.values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha), unsafe=False)
    return list(found)


def merge(model: nn.Module) -> int:
    """Add what adapters have learned to the weights, and take them off; how many there were.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> names = list(net.state_dict())
    >>> len(adapt(net)) == merge(net), sorted(net.state_dict()) == sorted(names)
    (True, True)
    """
    adapted = [m for m in model.modules() if parametrize.is_parametrized(m)]
    count = 0
    for module in adapted:
        if isinstance(module.parametrizations["weight"][0], LowRank):  # type: ignore[index]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            count += 1
    return count
