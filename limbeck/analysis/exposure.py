"""Exposure: how far a language model has memorised secrets that were planted in its training texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.data.language.tokens import Tokens


def exposure(secret: float, candidates: Tensor) -> float:
    r"""How much sooner than by guessing at random a secret is found by trying the likeliest candidate first, in bits.

    .. math:: \log_2 |R| - \log_2 \mathrm{rank}(s)

    Args:
        secret: The secret's loss; it is one of the candidates. Of equals it comes first.
        candidates: ``[R]``, the loss of every text that the secret might have been.

    Raises:
        DataError: There are no candidates, or the secret is none of them.

    Source: Carlini et al., "The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural Networks",
        2018, arXiv 1802.08232.

    >>> losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    >>> exposure(1.0, losses), exposure(4.0, losses)
    (2.0, 0.0)
    """
    if not len(candidates) or not bool((candidates == secret).any()):
        found = f"{len(candidates)} candidates, none of loss {secret:g}"
        raise DataError("the secret is not among its candidates", where="candidates", found=found)
    rank = 1 + int((candidates < secret).sum())
    return math.log2(len(candidates)) - math.log2(rank)


@dataclass(frozen=True)
class Canary:
    """A secret in a format.

    Args:
        prefix: What stands before it.
        secret: The secret itself.
        candidates: Every text that might stand in its place, itself among them.
        suffix: What stands behind it.
    """

    prefix: str
    secret: str
    candidates: tuple[str, ...]
    suffix: str = ""

    @property
    def text(self) -> str:
        """What is planted."""
        return self.prefix + self.secret + self.suffix


def canary_exposure(
    model: nn.Module, tokens: Tokens, canary: Canary, *, batch: int = 256, logits: str | None = None
) -> float:
    """The exposure of a canary in a causal language model, by the loss of each candidate behind the prefix.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``; its mode is as before afterwards.
        tokens: Its tokenizer.
        canary: What was planted in its training texts.
        batch: Candidates at once.
        logits: Where logits stand in its output.

    Raises:
        ConfigError: The secret is not among the candidates.
    """
    if canary.secret not in canary.candidates:
        found = f"{canary.secret!r} and {len(canary.candidates)} others"
        raise ConfigError("the secret is not among its candidates", where="canary", found=found)
    losses = text_losses(model, tokens, canary.prefix, canary.candidates, canary.suffix, batch=batch, logits=logits)
    return exposure(float(losses[canary.candidates.index(canary.secret)]), losses)


@torch.no_grad()
def text_losses(
    model: nn.Module,
    tokens: Tokens,
    prefix: str,
    texts: Sequence[str],
    suffix: str = "",
    *,
    batch: int = 256,
    logits: str | None = None,
) -> Tensor:
    """The negative log-likelihood in nats of each text, and what stands behind it, after a prefix: ``[R]`` float64.

    A text's tokens are cut as in training, where prefix and text are one; what they have in common with the prefix
    alone is only read.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    (head, _), *rows = tokens.encode([prefix, *(prefix + text + suffix for text in texts)])
    ids = [[*tokens.front, *row.tolist()] for row, _ in rows]
    own = [*tokens.front, *head.tolist()]
    begins = [next((i for i, (a, b) in enumerate(zip(row, own, strict=False)) if a != b), len(own)) for row in ids]
    found = []
    with dry(model):
        for start in range(0, len(ids), batch):
            some, firsts = ids[start : start + batch], begins[start : start + batch]
            width = max(map(len, some))
            read = torch.tensor([row + [tokens.pad] * (width - len(row)) for row in some], device=device)
            size = torch.tensor([len(row) for row in some], device=device).unsqueeze(1)
            place = torch.arange(width, device=device)
            output = call_model(model, {"input_ids": read, "attention_mask": (place < size).long()})
            log_p = logits_of(output, logits)[:, :-1].double().log_softmax(-1)
            each = -log_p.gather(-1, read[:, 1:].unsqueeze(-1)).squeeze(-1)
            first = torch.tensor(firsts, device=device).unsqueeze(1)
            counts = (place[1:] >= first) & (place[1:] < size)
            found.append(each.masked_fill(~counts, 0.0).sum(dim=1).cpu())
    return torch.cat(found)
