"""Several logits a class, folded to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.models.heads.plan import Head, Plan, Site, exchange


class SubclassHead(Head):
    r"""Several logits a class, folded to one.

    .. math:: z_c = T \log \sum_j e^{u_{c,j} / T}

    At the temperature at which the subclasses were learned this is the class's own logit, however its subclasses share
    it; at another, the class whose subclasses are further apart would win.

    >>> import torch
    >>> SubclassHead(8, classes=3, subclasses=4)(torch.zeros(2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, features: int, classes: int, subclasses: int, temperature: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.classes, self.subclasses, self.temperature = classes, subclasses, temperature
        self.sub = nn.Linear(features, classes * subclasses, bias)

    def forward(self, x: Tensor) -> Tensor:
        sub = self.sub(x).unflatten(-1, (self.classes, self.subclasses))
        return self.temperature * (sub / self.temperature).logsumexp(dim=-1)


@dataclass(frozen=True)
class Subclass(Plan):
    """LELP's head, arXiv 2409.20449.

    Args:
        layer: See :class:`Plan`.
        subclasses: Logits of a class.
        temperature: T at which they are folded: that of the loss.
    """

    name: ClassVar[str] = "subclass"
    subclasses: int = 10
    temperature: float = 2.0

    def put(self, site: Site) -> None:
        if self.subclasses < 1:
            raise ConfigError("a class needs one logit or more", where="head.subclasses", found=self.subclasses)
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("must be above zero", where="head.temperature", found=self.temperature)
        linear, bias = site.linear, site.linear.bias is not None
        head = SubclassHead(linear.in_features, linear.out_features, self.subclasses, self.temperature, bias)
        head.plan = self
        exchange(site.model, site.layer, head, like=linear)
