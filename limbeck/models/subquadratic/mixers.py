r"""What takes the place of softmax attention: linear attention, retention, gated linear attention, Mamba-2, mLSTM.

Each is a recurrence over matrices (see ``recurrence``) with its own queries, keys, decays, normaliser and gate. All
have ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` in the shapes of the attention that they replace, so that those
can be copied.

=============  =======================================================================================================
``attention``  softmax attention itself, quadratic: for layers of a hybrid that keep it
``linear``     queries and keys through elu + 1, normalised (Katharopoulos et al., 2020, arXiv 2006.16236)
``hedgehog``   learned softmax features, normalised (Zhang et al., 2024, arXiv 2402.04347)
``retention``  a fixed decay for each head (Sun et al., RetNet, 2023, arXiv 2307.08621)
``gla``        a decay for each key dimension, told by the token (Yang et al., 2023, arXiv 2312.06635)
``mamba2``     a decay and a step size for each head, told by the token; short convolutions; a skip (Dao & Gu, 2024,
               arXiv 2405.21060), with C, B and x for queries, keys and values
``mlstm``      forget and exponential input gates for each head, normalised (Beck et al., xLSTM, 2024, arXiv
               2405.04517), the gates capped softly as in xLSTM 7B (2503.13427)
=============  =======================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.reduction import widen
from limbeck.models.subquadratic.mixer import Mixer, Rotary, State


class Linear(Mixer):
    """Linear attention with elu + 1."""

    rotates, gated, normaliser = True, False, "sum"

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return F.elu(q) + 1, F.elu(k) + 1, None


class Hedgehog(Mixer):
    """Linear attention whose features are learned to be like softmax attention's."""

    rotates, gated, normaliser = True, False, "sum"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.q_feature = nn.Parameter(torch.empty(self.heads, self.dim, self.dim))
        self.k_feature = nn.Parameter(torch.empty(self.heads, self.dim, self.dim))

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        for feature in (self.q_feature, self.k_feature):
            feature.copy_(torch.eye(self.dim).expand_as(feature))

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k = (torch.cat([t.softmax(-1), (-t).softmax(-1)], dim=-1) for t in (q @ self.q_feature, k @ self.k_feature))
        return q, k, None


class Retention(Mixer):
    """Each head forgets at a pace of its own."""

    rotates = True

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # 1 - 2^(-5 - h) as in the paper, its pace spread over the heads there are
        powers = -5 - torch.linspace(0, 7, self.heads, device=q.device, dtype=q.dtype)
        decay = torch.log1p(-(2.0**powers)).view(1, -1, 1, 1).expand(*q.shape[:-1], 1)
        return q * self.dim**-0.5, k, decay


class GLA(Mixer):
    """Each key dimension is forgotten as the token says, by a gate of low rank."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rank = min(16, config.hidden_size)
        self.forget = nn.Sequential(
            nn.Linear(config.hidden_size, rank, bias=False), nn.Linear(rank, self.heads * self.dim)
        )

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        decay = F.logsigmoid(widen(self._split(self.forget(x)))) / 16  # the paper's temperature
        return q * self.dim**-0.5, k, decay


class Mamba2(Mixer):
    """A state space whose step each token sets for each head."""

    kernel = 4

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.step = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.step_bias, self.log_rate, self.skip = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        steps = torch.linspace(math.log(1e-3), math.log(0.1), self.heads).exp()
        self.step_bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
        self.log_rate.copy_(torch.linspace(1, 16, self.heads).log())
        self.skip.fill_(1.0)

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        step = F.softplus(widen(self.step(x)) + widen(self.step_bias)).transpose(1, 2).unsqueeze(-1)
        return q, k * step, -step * widen(self.log_rate).exp().view(1, -1, 1, 1)

    def _skip(self) -> Tensor | None:
        return widen(self.skip).view(-1, 1, 1)


class MLSTM(Mixer):
    """A matrix memory with gates for what is let in, as an exponential, and what is kept."""

    normaliser = "one"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gates = nn.Linear(config.hidden_size, 2 * self.heads)

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        self.gates.weight.zero_()
        # as in the paper: the forget gate begins nearly open, at paces from 3 to 6; the input gate nearly shut
        self.gates.bias.copy_(torch.cat([torch.full((self.heads,), -10.0), torch.linspace(3, 6, self.heads)]))

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gates = 15 * torch.tanh(widen(self.gates(x)) / 15)  # so that exponentials need no running maximum
        enter, keep = gates.transpose(1, 2).unsqueeze(-1).chunk(2, dim=1)
        return q * self.dim**-0.5, k * enter.exp(), F.logsigmoid(keep)


class Attention(Mixer):
    """Softmax attention: what the others take the place of."""

    rotates, gated = True, False

    def matrix(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None) -> Tensor:
        q, k, *_ = self._parts(x, rotary, mask, None)
        scores = (q @ k.mT).masked_fill(~self._sees(q, mask), -torch.inf)
        return scores.softmax(-1)

    def mixed(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        q, k, v, *_ = self._parts(x, rotary, mask, None)
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if state is not None:
            k, v = torch.cat([state[0], k], dim=-2), torch.cat([state[1], v], dim=-2)
            kept = torch.cat([state[2], kept], dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._sees(q, kept), scale=1.0)
        return out, (k, v, kept)

    @staticmethod
    def _sees(q: Tensor, mask: Tensor | None) -> Tensor:
        """``[B or 1, 1, L, K]``, True where a token looks at another; a token always sees itself."""
        length, whole = q.shape[-2], q.shape[-2] if mask is None else mask.shape[1]
        own = torch.arange(whole - length, whole, device=q.device).unsqueeze(1)
        column = torch.arange(whole, device=q.device)
        sees = (column <= own)[None, None]
        return sees if mask is None else (sees & mask[:, None, None, :]) | (column == own)


MIXERS: dict[str, Callable[[Any], Mixer]] = {
    "attention": Attention,
    "linear": Linear,
    "hedgehog": Hedgehog,
    "retention": Retention,
    "gla": GLA,
    "mamba2": Mamba2,
    "mlstm": MLSTM,
}
