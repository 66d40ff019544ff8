"""How likely a place of a text holds something private: by patterns, by the token, or by what a model has memorised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import draw_bits, key, key_tensor, uniform
from limbeck.core.labels import split_labels
from limbeck.core.reduction import check_positive, check_same_shape, widen
from limbeck.core.trace import Trace
from limbeck.data.language.tokens import Tokens

Mode = Literal["up", "down"]
_LAPLACE = 31  # keeps these draws apart from others
_PLACES = 1 << 24  # more than a row has places


def span_scores(texts: Sequence[str], offsets: Tensor, patterns: Sequence[str]) -> Tensor:
    r"""1 for each token that shares a character with a match of a pattern in its text, else 0.

    For names and addresses let a recogniser find them, and give what it found as patterns (``re.escape``). The score of
    a place is that of the token it predicts: ``scores.roll(-1, dims=1)``.

    Args:
        texts: One for each row.
        offsets: ``[B, L, 2]``, the first character of each token, and the one behind its last.
        patterns: Regular expressions.

    Raises:
        ConfigError: No regular expression.

    >>> offsets = torch.tensor([[[0, 2], [3, 6], [6, 7]]])
    >>> span_scores(["at 4711."], offsets, [r"\d+"])
    tensor([[0., 1., 1.]])
    """
    compiled = [compiled_pattern(pattern) for pattern in patterns]
    scores = torch.zeros(offsets.shape[:2], device=offsets.device)
    for row, text in enumerate(texts):
        for pattern in compiled:
            for match in pattern.finditer(text):
                begin, end = match.span()
                shares = torch.maximum(offsets[row, :, 0], torch.tensor(begin)) < offsets[row, :, 1].clamp(max=end)
                scores[row].masked_fill_(shares, 1.0)
    return scores


def token_scores(tokenizers: tuple[Tokens, Tokens] | None, pattern: str) -> Tensor:
    r"""1 for each token of the student's vocabulary that a pattern matches somewhere, else 0: ``[V]``.

    Args:
        tokenizers: The student's and the teacher's, as ``DataInfo`` has them.
        pattern: A regular expression.

    Raises:
        ConfigError: The tokenizers are not known.

    >>> from limbeck.data.language import ByteTokens
    >>> scores = token_scores((ByteTokens(), ByteTokens()), r"\d")
    >>> int(scores.sum()), "".join(ByteTokens().decode([i]) for i in scores.nonzero().flatten().tolist())
    (10, '0123456789')
    """
    if tokenizers is None:
        remedy = "train with limbeck's engine on texts, or give DataInfo(tokenizers=...) to setup"
        raise ConfigError("the tokenizer is not known", where="pattern", remedy=remedy)
    tokens, compiled = tokenizers[0], compiled_pattern(pattern)
    return torch.tensor([float(bool(compiled.search(tokens.decode([token])))) for token in range(tokens.size)])


def scores_of(teacher: Trace, batch: Batch, table: Tensor | None = None) -> Tensor:
    """The score of each place ``[B, *]``: by a table of tokens, as the batch has it, or by two teachers.

    Args:
        teacher: Its members, where there are two, are the teacher and a model that has not seen the private texts.
        batch: With ``extras["privacy"]``, or labels.
        table: ``[V]``, the score of each token.

    Raises:
        DataError: Nothing tells.
    """
    if table is not None:
        label, known = split_labels(batch.require("labels"), len(table))
        return table[label].masked_fill(~known, 0.0)
    given = batch.extras.get("privacy")
    if isinstance(given, Tensor):
        return given
    if len(teacher.members) == 2:
        own, other = (member.logits for member in teacher.members)
        return memorisation_scores(own, other, batch.require("labels"))
    raise DataError(
        "nothing says which places are private",
        where="batch.extras['privacy']",
        remedy="give a pattern, or scores in the batch, or SeveralTeachers([teacher, reference])",
    )


def memorisation_scores(teacher_logits: Tensor, reference_logits: Tensor, labels: Tensor, scale: float = 5.0) -> Tensor:
    r"""How much more a teacher expects each token than a model that has not seen the private texts.

    .. math:: \rho = \mathrm{clip}\left( \frac{\log p_T(y) - \log p_{ref}(y)} c, 0, 1 \right)

    Args:
        teacher_logits, reference_logits: ``[B, *, C]``.
        labels: ``[B, *]``; where it is negative the score is 0.
        scale: c, in nats.

    >>> teacher, reference = torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2)
    >>> memorisation_scores(teacher, reference, torch.tensor([0]), scale=1.0)
    tensor([0.6864])
    """
    check_same_shape(teacher_logits, reference_logits, "teacher_logits", "reference_logits")
    check_positive(scale, "scale")
    label, known = split_labels(labels, teacher_logits.shape[-1])
    said, other = (
        widen(z).log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1) for z in (teacher_logits, reference_logits)
    )
    return ((said - other) / scale).clamp(0, 1).masked_fill(~known, 0.0).detach()


def laplace(shape: torch.Size, index: Tensor | None, seed: int, device: torch.device) -> Tensor:
    """Noise of Laplace's distribution with scale 1 for ``[B, *, C]``: of each sample, place and class always the same.

    Args:
        shape: Of the logits.
        index: ``[B]``, numbers of the samples; ``None``: their order.
        seed: Another one draws other noise.
    """
    rows = torch.arange(shape[0], device=device) if index is None else index.to(device)
    places = torch.arange(shape[1:-1].numel(), device=device)
    counter = (rows.unsqueeze(1) * _PLACES + places).reshape(shape[:-1])
    first = key_tensor([key(_LAPLACE, seed)], device)
    bits = draw_bits(first, draw_bits(first, counter) ^ torch.arange(shape[-1], device=device)).squeeze(-1)
    centred = uniform(bits) - 0.5
    return -centred.sign() * (1 - 2 * centred.abs()).clamp(min=2.0**-24).log()


def blurred(probabilities: Tensor, scale: Tensor, index: Tensor | None, seed: int) -> Tensor:
    """Predictions ``[B, *, C]`` with Laplace noise of a scale ``[B, *, 1]``, as far as that leaves a prediction."""
    noise = laplace(probabilities.shape, index, seed, probabilities.device).to(probabilities.dtype)
    found = (probabilities + noise * scale).clamp(min=0)
    total = found.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, found / total.masked_fill(total == 0, 1.0), probabilities)


def check_swing(temperature: float, hottest: float, epsilon: float | None, mode: str) -> None:
    """Refuse options that cannot be."""
    for name, value in (("temperature", temperature), ("hottest", hottest), ("epsilon", epsilon)):
        if value is not None:
            check_positive(value, name)
    if mode not in get_args(Mode):
        raise ConfigError("no such mode", where="mode", found=repr(mode), wanted="'up' or 'down'")


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression, or an error that shows it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"no regular expression: {error}", where="pattern", found=repr(pattern)) from error
