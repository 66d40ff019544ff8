"""The one place where labels are shifted: what position t predicts is the token at t + 1."""

from __future__ import annotations

from torch import Tensor


def next_tokens(ids: Tensor, document: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    r"""What each position of a causal language model predicts, and whether that counts.

    .. math:: y_t = x_{t+1}, \qquad m_t = l_{t+1} \qquad \text{where } d_t = d_{t+1} > 0

    The last position of a document predicts nothing: neither the next document's first token nor padding.

    Args:
        ids: ``[B, L]`` tokens :math:`x`.
        document: ``[B, L]`` integers :math:`d`: which document of its row a token is of, 0 for padding.
        learned: ``[B, L]`` booleans :math:`l`: the token is to be predicted.

    Returns:
        Labels ``[B, L]``, -1 where there is none; and the mask ``[B, L]``, True where a position counts.

    >>> import torch
    >>> ids, document = torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[1, 1, 2, 2, 0]])
    >>> labels, mask = next_tokens(ids, document, ids > 6)
    >>> labels.tolist(), mask.int().tolist()
    ([[6, -1, 8, -1, -1]], [[0, 0, 1, 0, 0]])
    """
    labels, mask = ids.new_full(ids.shape, -1), learned.new_zeros(ids.shape)
    within = (document[:, :-1] == document[:, 1:]) & (document[:, :-1] > 0)
    labels[:, :-1] = ids[:, 1:].masked_fill(~within, -1)
    mask[:, :-1] = learned[:, 1:] & within
    return labels, mask
