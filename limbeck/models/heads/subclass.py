"""Several logits a class, folded to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.models.heads.plan import Head, Plan, Site, exchange


class SubclassHead(Head):
    r"""Several logits a class; a class counts for all of its own, :math:`z_c = \log \sum_j e^{u_{c,j}}`.

    >>> import torch
    >>> SubclassHead(8, classes=3, subclasses=4)(torch.zeros(2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, features: int, classes: int, subclasses: int, bias: bool = True) -> None:
        super().__init__()
        self.classes, self.subclasses = classes, subclasses
        self.sub = nn.Linear(features, classes * subclasses, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.sub(x).unflatten(-1, (self.classes, self.subclasses)).logsumexp(dim=-1)


@dataclass(frozen=True)
class Subclass(Plan):
    """LELP's head, arXiv 2409.20449.

    Args:
        layer: See :class:`Plan`.
        subclasses: Logits of a class.
    """

    name: ClassVar[str] = "subclass"
    subclasses: int = 10

    def put(self, site: Site) -> None:
        if self.subclasses < 1:
            raise ConfigError("a class needs one logit or more", where="head.subclasses", found=self.subclasses)
        linear = site.linear
        head = SubclassHead(linear.in_features, linear.out_features, self.subclasses, linear.bias is not None)
        head.plan = self
        exchange(site.model, site.layer, head, like=linear)
