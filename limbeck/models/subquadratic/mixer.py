"""What all mixers have in common: projections, positions, masks, short convolutions, normalisers, gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.reduction import widen
from limbeck.models.subquadratic.recurrence import mixing_matrix, scan

State = tuple[Tensor, ...]
Rotary = tuple[Tensor, Tensor]
_OPEN = 1.2784645  # silu of it is 1: gates begin open
_SMALL = 1e-6


class Mixer(nn.Module):
    """A recurrence between four projections; subclasses say what they remember and forget.

    Args:
        config: Of the model; see :class:`~limbeck.models.subquadratic.model.SubquadraticConfig`.
    """

    rotates = False  # queries and keys are turned by their positions
    gated = True  # what comes out of each head is normalised, and let through by a gate that the token sets
    normaliser: str | None = None  # "sum": rows of the matrix sum to one; "one": by their sum where that is above one
    kernel = 1  # of the short convolutions over queries, keys and values

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        width, inner, few = config.hidden_size, self.heads * self.dim, self.groups * self.dim
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, few, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, few, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.out_bias)
        if self.kernel > 1:
            self.conv_weight = nn.Parameter(torch.empty(inner + 2 * few, self.kernel))
        if self.gated:
            self.norm_weight = nn.Parameter(torch.empty(self.dim))
            self.gate = nn.Linear(width, inner)
        self.eps = config.rms_norm_eps

    @torch.no_grad()
    def reset(self) -> None:
        """Where all but the projections begins: gates open, convolutions the identity."""
        if self.kernel > 1:
            self.conv_weight.zero_()[:, -1] = 1.0
        if self.gated:
            self.norm_weight.fill_(1.0)
            self.gate.weight.zero_()
            self.gate.bias.fill_(_OPEN)

    def remembers(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys as they meet, and log decays; of queries, keys and values ``[B, H, L, D]``."""
        return q * self.dim**-0.5, k, None

    def matrix(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None) -> Tensor:
        """The token-mixing matrix ``[B, H, L, L]``: ``matrix @ values`` is what comes out of the heads.

        Args:
            x: ``[B, L, W]``, normalised as the mixer takes it.
            rotary: Cosines and sines ``[B or 1, L, D]``.
            mask: ``[B, L]``, True where there is a token.
        """
        q, k, _, decay, _ = self._parts(x, rotary, mask, None)
        found = mixing_matrix(q, k, decay)
        return self._skipped(found / self._size(found.sum(-1, keepdim=True)))

    def values(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None) -> Tensor:
        """What is mixed, ``[B, H, L, D]``."""
        return self._parts(x, rotary, mask, None)[2]

    def mixed(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """What comes out of the heads, ``[B, H, L, D]``, before norm and gate, and the state afterwards."""
        q, k, v, decay, tail = self._parts(x, rotary, mask, None if state is None else state[1])
        held = v if self.normaliser is None else torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        out, memory = scan(q, k, held, decay, None if state is None else state[0])
        if self.normaliser is not None:
            out, total = out[..., :-1], out[..., -1:]
            out = out / self._size(total)
        skip = self._skip()
        return (out if skip is None else out + skip * v), (memory, tail)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """What is added to the stream, ``[B, L, W]``, and the state afterwards."""
        out, state = self.mixed(x, rotary, mask, state)
        if self.gated:
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps) * self.norm_weight
        out = out.transpose(1, 2).flatten(2).to(x.dtype)
        if self.gated:
            out = out * F.silu(self.gate(x))
        return self.o_proj(out), state

    def _parts(self, x: Tensor, rotary: Rotary, mask: Tensor | None, tail: Tensor | None) -> Any:
        """Queries, keys and values as the recurrence takes them, decays, and what convolutions still need."""
        joined = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if mask is not None:  # before a text there is nothing
            joined = joined.masked_fill(~mask.unsqueeze(-1), 0.0)
        joined, tail = self._convolved(joined, tail)
        few = self.groups * self.dim
        q, k, v = (self._split(t) for t in joined.split([self.heads * self.dim, few, few], dim=-1))
        if self.rotates:
            q, k = rotate(q, rotary), rotate(k, rotary)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        q, k, v = widen(q), widen(k), widen(v)
        q, k, decay = self.remembers(x, q, k, v)
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0.0)
        return q, k, v, decay, tail

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def _convolved(self, joined: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Through a short causal convolution of each channel, and what the next tokens need of these."""
        if self.kernel == 1:
            return joined, joined[:, :0]
        if tail is None:
            tail = joined.new_zeros(len(joined), self.kernel - 1, joined.shape[-1])
        longer = torch.cat([tail.to(joined), joined], dim=1)
        out = F.conv1d(longer.mT, self.conv_weight.unsqueeze(1), groups=joined.shape[-1]).mT
        return out, longer[:, longer.shape[1] - self.kernel + 1 :]

    def _size(self, total: Tensor) -> Tensor:
        """By what rows are divided."""
        if self.normaliser == "sum":
            return total + _SMALL
        return total.abs().clamp(min=1.0) if self.normaliser == "one" else torch.ones_like(total)

    def _skip(self) -> Tensor | None:
        """``[H, 1, 1]``, the share of its own value that each token gets beside the recurrence."""
        return None

    def _skipped(self, found: Tensor) -> Tensor:
        skip = self._skip()
        return found if skip is None else found + skip * torch.eye(found.shape[-1]).to(found)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn ``[B, H, L, D]`` by positions, halves against halves as in Llama."""
    cosine, sine = (t.unsqueeze(1).to(x.dtype) for t in rotary)
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine
