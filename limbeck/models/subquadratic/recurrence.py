r"""Linear recurrences over matrices, in three forms that agree: as a matrix, in chunks, and token by token.

.. math:: S_t = a_t \odot S_{t-1} + k_t v_t^\top, \quad o_t = q_t^\top S_t \qquad \Longleftrightarrow \qquad
    O = M V, \quad M_{ij} = \sum_d q_{id} k_{jd} \prod_{j < s \le i} a_{sd} \;\; (j \le i)

Decays a are given by their logarithms, none of them above 0, one for each key dimension or one for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = {True: 64, False: 16}  # tokens at a time, with one decay for all dimensions, and with one for each


def mixing_matrix(q: Tensor, k: Tensor, log_decay: Tensor | None = None) -> Tensor:
    r"""What each token takes of each before it, :math:`M` ``[B, H, L, L]``, zero above the diagonal.

    Args:
        q, k: ``[B, H, L, D]``.
        log_decay: ``[B, H, L, D]``, or ``[B, H, L, 1]``; ``None``: nothing decays.

    >>> q = k = torch.ones(1, 1, 3, 1)
    >>> mixing_matrix(q, k, torch.full((1, 1, 3, 1), 0.5).log())[0, 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.2500, 0.5000, 1.0000]])
    """
    if log_decay is None:
        return (q @ k.mT).tril()
    reach = log_decay.cumsum(-2)
    if log_decay.shape[-1] == 1:
        return _inner(q, k, reach)
    length, rows = q.shape[-2], []
    for start in range(0, length, _CHUNK[False]):  # seen from a chunk's start, nothing before it grows without bounds
        stop = min(start + _CHUNK[False], length)
        own, since = slice(start, stop), reach[..., max(start - 1, 0) : max(start, 1), :] * (start > 0)
        before = (q[..., own, :] * (reach[..., own, :] - since).exp()) @ (
            k[..., :start, :] * (since - reach[..., :start, :]).exp()
        ).mT
        inner = _inner(q[..., own, :], k[..., own, :], reach[..., own, :])
        rows.append(torch.nn.functional.pad(torch.cat([before, inner], dim=-1), (0, length - stop)))
    return torch.cat(rows, dim=-2)


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""What comes out, :math:`O` ``[B, H, L, E]``, and the state after the last token, ``[B, H, D, E]``.

    Time and memory grow with the length, not with its square: chunks are read one after the other, each with the state
    that those before it left. With one token it is a step of the recurrence.

    Args:
        q, k: ``[B, H, L, D]``.
        v: ``[B, H, L, E]``.
        log_decay: ``[B, H, L, D]``, or ``[B, H, L, 1]``; ``None``: nothing decays.
        state: After the tokens before these; ``None``: there were none.

    >>> out, state = scan(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), torch.tensor([[[[1.0], [3.0]]]]))
    >>> out.flatten().tolist(), state.flatten().tolist()
    ([1.0, 4.0], [4.0])
    """
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    decay = q.new_zeros(*q.shape[:-1], 1) if log_decay is None else log_decay
    size, found = _CHUNK[decay.shape[-1] == 1], []
    for own_q, own_k, own_v, own in zip(*(t.split(size, dim=-2) for t in (q, k, v, decay)), strict=True):
        reach = own.cumsum(-2)
        found.append((own_q * reach.exp()) @ state + _inner(own_q, own_k, reach) @ own_v)
        last = reach[..., -1:, :]
        state = last.exp().mT * state + (own_k * (last - reach).exp()).mT @ own_v
    return torch.cat(found, dim=-2), state


def _inner(q: Tensor, k: Tensor, reach: Tensor) -> Tensor:
    """The matrix of one chunk, from sums of log decays up to each token; no exponent is above 0."""
    length = q.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if reach.shape[-1] == 1:
        return (q @ k.mT) * (reach - reach.mT).masked_fill(later, -torch.inf).exp()
    apart = reach.unsqueeze(-2) - reach.unsqueeze(-3)
    weights = apart.masked_fill(later.unsqueeze(-1), -torch.inf).exp()
    return torch.einsum("...id,...jd,...ijd->...ij", q, k, weights)
