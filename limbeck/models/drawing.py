"""How the next token is drawn: by a hash of the row's key and the place, from one model or from two."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.hashing import draw_bits, key_tensor, uniform

_BITS = 24  # of a number that ``uniform`` draws


class Draw:
    """Leaves one token of each row, drawn by a hash of the row's key and the place."""

    def __init__(self, keys: Tensor, first: int) -> None:
        self.keys, self.first, self.log_probs = keys, first, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = torch.full_like(self.keys, input_ids.shape[1] - self.first)
        bits = draw_bits(self.keys, place[:1]).squeeze(0)  # the same place in every row, each with its key
        high, low = uniform(bits).double(), uniform(bits << _BITS).double()
        number = high + (low + 0.5 * 2.0**-_BITS) * 2.0**-_BITS
        chances = scores.double().softmax(dim=-1)
        reached = chances.cumsum(dim=-1)
        chosen = (reached <= number.unsqueeze(1) * reached[:, -1:]).sum(dim=-1, keepdim=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        self.log_probs.append(chances.gather(1, chosen).log().squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class Mixture:
    """Adds what a second model thinks of the next token, which it reads one by one."""

    def __init__(self, model: nn.Module, mask: Tensor, share: float, temperature: float) -> None:
        self.model, self.mask, self.share, self.temperature = model, mask.long(), share, temperature
        self.past: Any = None
        self.places = takes_places(model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        more = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.nn.functional.pad(self.mask, (0, more), value=1)
        news = input_ids if self.past is None else input_ids[:, -1:]
        given: dict[str, Any] = {"attention_mask": self.mask, "past_key_values": self.past, "use_cache": True}
        if self.places:
            given["position_ids"] = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -news.shape[1] :]
        out = self.model(input_ids=news, **given)
        self.past = out.past_key_values
        return mixture(scores, out.logits[:, -1].to(scores) / self.temperature, self.share)


def mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    r"""Log-probabilities of :math:`(1 - \alpha) p_1 + \alpha p_2` from logits of both, ``[*, V]``.

    Of vocabularies that are padded to different sizes, the first logits of both count.

    >>> mixture(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5, 0.0]).log(), 0.5).exp()
    tensor([0.7500, 0.2500])
    """
    width = min(first.shape[-1], second.shape[-1])
    rest = first.shape[-1] - width
    own, other = (t[..., :width].double().log_softmax(dim=-1) for t in (first, second))
    shares = torch.tensor([1 - share, share], dtype=torch.double, device=first.device).log()
    mixed = torch.logaddexp(own + shares[0], other + shares[1])
    return torch.nn.functional.pad(mixed, (0, rest), value=-torch.inf).to(first.dtype)


def row_keys(index: Tensor, key: int) -> Tensor:
    """Keys ``[B]`` for :func:`write` of samples, apart from those of any other key.

    >>> row_keys(torch.tensor([4, 7, 4]), 1).unique().numel()
    2
    """
    return draw_bits(key_tensor([key], index.device), index).squeeze(-1)


def takes_places(model: nn.Module) -> bool:
    """Whether a model is told the positions of tokens, which padding on the left would shift."""
    return "position_ids" in inspect.signature(getattr(model, "forward")).parameters  # noqa: B009
