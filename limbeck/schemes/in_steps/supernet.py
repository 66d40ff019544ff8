"""A model that is many: nested subsets of its heads and channels, all on the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ModelError
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of

#: Layers whose inputs are units that can be left out without changing anything else's shape: of attention the heads, of
#: a perceptron or a residual block the channels inside. Names of limbeck's own models, of timm's and transformers'.
INSIDE = (
    "*attn.proj",
    "*attention.output.dense",
    "*attention.o_proj",
    "*mlp.2",
    "*mlp.fc2",
    "*.output.dense",
    "*.conv2",
    "blocks.[1-9]*.linear",
)
_HEADS = ("heads", "num_heads", "num_attention_heads")


class Reader:
    """A layer that reads units, and which of them stay at each level.

    Args:
        name: Of the layer.
        layer: Linear, or a convolution without groups.
        units: How many; each is as many of the layer's inputs.
    """

    def __init__(self, name: str, layer: nn.Linear | nn.Conv2d, units: int) -> None:
        self.name, self.layer, self.units = name, layer, units

    def importance(self, gradient: Tensor) -> Tensor:
        r"""By how much the loss changes, to first order, if a unit goes, :math:`|\sum w\, \partial L / \partial w|`."""
        change = (self.layer.weight * gradient).transpose(0, 1).flatten(1).sum(dim=1)
        return change.view(self.units, -1).sum(dim=1).abs()


class Supernet:
    """Levels of a model: at each a part of its units stay, and those of a smaller level are among those of a larger.

    The model is changed: its readers have a buffer of masks and a hook. At no level, or one at which all units stay, it
    says what it said before.

    Args:
        model: Whose weights all levels share.
        patterns: Names of the layers that read units.

    Raises:
        ModelError: There is no such layer.

    >>> from limbeck.models import create
    >>> net = Supernet(create("vit_mini", image_size=8))
    >>> [(reader.name, reader.units) for reader in net.readers][:2]
    [('blocks.0.attn.proj', 4), ('blocks.0.mlp.2', 256)]
    """

    level: int | None = None

    def __init__(self, model: nn.Module, patterns: Sequence[str] = INSIDE) -> None:
        self.model = model
        self.readers = list(_readers(model, patterns))
        if not self.readers:
            raise ModelError(
                "no layer of the teacher is known to read units that can be left out",
                where="scheme.units",
                found=type(model).__name__,
                wanted="names of layers such as *.mlp.fc2, whose inputs nothing else reads",
            )
        for reader in self.readers:
            reader.layer.register_forward_pre_hook(self._hook)

    def rank(self, batches: Iterable[Batch], shares: Sequence[float], logits: str | None = None) -> None:
        """Settle what stays at each level: the units that matter most on these batches.

        Args:
            batches: With labels.
            shares: Of the units of each layer that stay; one unit does always.
            logits: Where logits stand in the model's output.
        """
        totals = [torch.zeros(reader.units) for reader in self.readers]
        weights = [reader.layer.weight for reader in self.readers]
        with dry(self.model), torch.enable_grad():
            for batch in batches:
                said = logits_of(call_model(self.model, batch.inputs), logits)
                loss = F.cross_entropy(said, batch.require("labels").long())
                found = torch.autograd.grad(loss, weights)
                for total, reader, gradient in zip(totals, self.readers, found, strict=True):
                    total += reader.importance(gradient).detach().cpu()
        for total, reader in zip(totals, self.readers, strict=True):
            place = torch.empty(reader.units, dtype=torch.long)
            place[total.argsort(descending=True, stable=True)] = torch.arange(reader.units)
            counts = torch.tensor([max(1, round(share * reader.units)) for share in shares])
            weight = reader.layer.weight
            kept = (place < counts.unsqueeze(1)).to(weight.device, weight.dtype)
            reader.layer.register_buffer("kept_units", kept.repeat_interleave(weight.shape[1] // reader.units, dim=1))

    def _hook(self, layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.level is None:
            return None
        kept = layer.kept_units[self.level]  # type: ignore[index]
        first = given[0]
        mask = kept if isinstance(layer, nn.Linear) else kept.view(-1, 1, 1)
        return (first * mask.to(first.dtype), *given[1:])

    def scale(self, level: int, inputs: Any, logits: str | None = None) -> float:
        """The part of the model's weights that a level uses: those that some example's logits depend on.

        Weights that not even the whole model uses do not count.

        Args:
            level: Which.
            inputs: Examples.
            logits: Where logits stand in the output.
        """
        whole, part = (self._used(inputs, logits, at) for at in (None, level))
        used = sum(int((a & b).sum()) for a, b in zip(part, whole, strict=True))
        return used / max(1, sum(int(a.sum()) for a in whole))

    def _used(self, inputs: Any, logits: str | None, level: int | None) -> list[Tensor]:
        before, self.level = self.level, level
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with dry(self.model), torch.enable_grad():
                said = logits_of(call_model(self.model, inputs), logits)
                weights = torch.linspace(1.0, 2.0, said.numel(), device=said.device).view_as(said)
                found = torch.autograd.grad((said * weights).sum(), parameters, allow_unused=True)
        finally:
            self.level = before
        return [
            torch.zeros_like(p, dtype=torch.bool) if g is None else g != 0
            for p, g in zip(parameters, found, strict=True)
        ]


def _readers(model: nn.Module, patterns: Sequence[str]) -> Iterable[Reader]:
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            continue
        units = width = layer.weight.shape[1]
        if "attn" in name or "attention" in name:
            owners = [model.get_submodule(name.rsplit(".", k)[0]) for k in range(1, name.count(".") + 1)]
            counts = [getattr(owner, field, None) for owner in owners for field in _HEADS]
            units = next((n for n in counts if isinstance(n, int) and width % n == 0), 1)
        if units > 1:
            yield Reader(name, layer, units)
