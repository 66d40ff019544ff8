"""Texts written by causal language models, many at a time, through transformers' own ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.divergences import soften
from limbeck.core.errors import ConfigError, DataError, MissingExtra, ModelError
from limbeck.core.reduction import check_inside, reduce
from limbeck.core.survey import dry
from limbeck.core.trace import logits_of
from limbeck.models.drawing import Draw, Mixture, takes_places

_NEVER = 2**31 - 1  # no token has this id


@dataclass(frozen=True)
class Decoding:
    """How a text is chosen from what a model thinks likely.

    Args:
        max_new_tokens: Of a completion at most.
        temperature: Logits are divided by it; 0 takes the likeliest token every time.
        top_k: Draw among so many likeliest tokens; 0: among all.
        top_p: Draw among the likeliest tokens that together have this probability.
        beams: Of beam search, which draws nothing; its scores are sums of log-probabilities, whatever the length.
        keep: The so many best of the beams.

    Raises:
        ConfigError: Numbers that cannot be.

    >>> Decoding(temperature=0.0).draws, Decoding(beams=5).draws, Decoding().draws
    (False, False, True)
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    keep: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("beams", 1), ("keep", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"must be a whole number, {least} or more", where=name, found=repr(value))
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("must be 0 or above, and finite", where="temperature", found=self.temperature)
        if self.top_p <= 0 or self.top_p > 1:
            raise ConfigError("must be above 0, and 1 at most", where="top_p", found=self.top_p)
        if self.keep > self.beams:
            raise ConfigError("there are not so many beams", where="keep", found=self.keep, wanted=self.beams)

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.beams == 1 and self.temperature > 0


@dataclass
class Completions:
    """What was written after some prompts; with ``keep`` above 1, so many rows for each, the best first.

    Args:
        ids: ``[B, N]``, padded on the right.
        lengths: ``[B]`` tokens of each, its end included.
        finished: ``[B]``, True where it came to an end by itself.
        log_probs: ``[B, N]``, of what was drawn: each token's log-probability in the distribution it was drawn from,
            0 in the padding; ``None`` where nothing was drawn.
        scores: ``[B]``, of beam search: each text's log-probability; else ``None``.
    """

    ids: Tensor
    lengths: Tensor
    finished: Tensor
    log_probs: Tensor | None = None
    scores: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """``[B, N]``, True where there is a token and no padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)


def check_writes(model: nn.Module, where: str) -> None:
    """Refuse a model that cannot write texts.

    Raises:
        ModelError: It has no ``generate``, or is no causal language model.
    """
    can = getattr(model, "can_generate", None)
    writes = callable(getattr(model, "generate", None)) and (can is None or bool(can()))
    if not writes or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            "this model does not write texts",
            where=where,
            found=type(model).__name__,
            wanted="a causal language model of transformers, with generate()",
            remedy="use another model, or a scheme that writes nothing with it",
        )


def write(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    decoding: Decoding,
    *,
    ends: Sequence[int],
    pad: int,
    keys: Tensor | None = None,
    mixed: nn.Module | None = None,
    share: float = 0.0,
    where: str = "model",
) -> Completions:
    r"""Go on with prompts, in evaluation mode and without gradients; models and random states stay as they were.

    What is drawn follows from a row's key, the number of its token and the model, and from nothing else: not from the
    other rows of the batch, nor from a generator's state. With ``mixed`` each token is drawn from two models at once,

    .. math:: \tilde p(y_t \mid y_{<t}) = (1 - \alpha)\, q(y_t \mid y_{<t}) + \alpha\, p(y_t \mid y_{<t})

    at the same temperature, before ``top_k`` and ``top_p`` (teacher-mixed sampling of MiniLLM, arXiv 2306.08543).

    Args:
        model: :math:`q`, of transformers; hooks on it see these passes as they see any other.
        ids, mask: ``[B, P]`` prompts, padded on the left; True where there is a token.
        decoding: How tokens are chosen.
        ends: Ids that end a text; each is the last token of its text.
        pad: The id that fills up.
        keys: ``[B]`` integers, one for each row; ``None`` draws them from torch's random state.
        mixed: :math:`p`, with the same tokens.
        share: :math:`\alpha`.
        where: The model's name, for messages.

    Raises:
        ModelError: It cannot write, or has too few positions.
        ConfigError: Beams cannot be mixed.
    """
    check_writes(model, where)
    _check_room(model, ids.shape[1] + decoding.max_new_tokens, decoding, where)
    if mixed is not None and not decoding.draws:
        raise ConfigError("only what is drawn can be drawn from two models", where="temperature", found="no chance")
    if keys is None and decoding.draws:
        keys = torch.randint(-(2**62), 2**62, (len(ids),)).to(ids.device)
    processors, draw = _processors(decoding, ids, mask, keys, mixed, share)
    with contextlib.ExitStack() as stack:
        for each in (model, mixed):
            if each is not None:
                stack.enter_context(dry(each))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "logits_processor": processors}
        out = model.generate(generation_config=_config(decoding, ends, pad), **given)  # type: ignore[operator]
    written = out.sequences[:, ids.shape[1] :]
    is_end = torch.isin(written, torch.tensor(list(ends) or [_NEVER], device=ids.device))
    finished = is_end.any(dim=1)
    lengths = torch.where(finished, is_end.int().argmax(dim=1) + 1, written.shape[1])
    found = Completions(written, lengths, finished)
    found.ids = written.masked_fill(~found.mask, pad)
    if decoding.beams > 1:
        found.scores = _scores(model, ids, mask, found, decoding.keep)
    if draw is not None:
        found.log_probs = torch.stack(draw.log_probs[: written.shape[1]], dim=1).masked_fill(~found.mask, 0.0)
    return found


def _scores(model: nn.Module, ids: Tensor, mask: Tensor, found: Completions, keep: int) -> Tensor:
    """Each text's log-probability, by one more pass over it: ``generate`` would hold its scores of every place."""
    sums = []
    with dry(model):
        for number in range(keep):  # as many rows at a time as there are prompts
            own, there = found.ids[number::keep], found.mask[number::keep]
            whole = torch.cat([mask, there], dim=1).long()
            given: dict[str, Any] = {"attention_mask": whole, "use_cache": False}
            if takes_places(model):
                given["position_ids"] = (whole.cumsum(dim=1) - 1).clamp(min=0)
            logits = logits_of(model(input_ids=torch.cat([ids, own], dim=1), **given))
            said = soften(logits[:, ids.shape[1] - 1 : -1]).gather(-1, own.unsqueeze(-1)).squeeze(-1)
            sums.append(reduce(said, there, "none").sum(dim=1))
    return torch.stack(sums, dim=1).flatten()


def _config(decoding: Decoding, ends: Sequence[int], pad: int) -> Any:
    """Everything that a model's own settings might add to its distribution is said here to be absent."""
    transformers = _transformers()
    return transformers.GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        num_return_sequences=decoding.keep,
        length_penalty=0.0 if decoding.beams > 1 else 1.0,  # beams are told apart by log-probabilities of whole texts
        early_stopping=False,
        do_sample=False,  # draws are made by a processor of our own, and what it drew is the likeliest
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        use_cache=True,
        eos_token_id=list(ends) or [_NEVER],
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=False,
    )


def _check_room(model: nn.Module, wanted: int, decoding: Decoding, where: str) -> None:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < wanted:
        raise ModelError(
            "this model has no positions for such long texts",
            where=where,
            found=f"{most} positions",
            wanted=f"{wanted}: prompts of {wanted - decoding.max_new_tokens} and {decoding.max_new_tokens} more tokens",
            remedy="lower max_new_tokens, or give the data a smaller length",
        )


def _processors(
    decoding: Decoding, ids: Tensor, mask: Tensor, keys: Tensor | None, mixed: nn.Module | None, share: float
) -> tuple[Any, Draw | None]:
    transformers = _transformers()
    found = transformers.LogitsProcessorList()
    if not decoding.draws:
        return found, None
    assert keys is not None
    if decoding.temperature != 1:
        found.append(transformers.TemperatureLogitsWarper(float(decoding.temperature)))
    if mixed is not None:
        check_inside(share, "share", closed=True)
        found.append(Mixture(mixed, mask, share, decoding.temperature))
    if decoding.top_k:
        found.append(transformers.TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(transformers.TopPLogitsWarper(decoding.top_p))
    draw = Draw(keys.to(ids.device), ids.shape[1])
    found.append(draw)
    return found, draw


def endings(tokens: Any, model: nn.Module | None = None) -> list[int]:
    """Ids that end a text: the tokenizer's end, and those special tokens that the model's own settings name.

    Args:
        tokens: The tokenizer, with ``eos``; special tokens are told by ``specials`` and ``table()``, where it has them.
        model: Of transformers.

    Raises:
        DataError: There is no such id, so no text would ever end.
    """
    table = tokens.table() if getattr(tokens, "specials", ()) else {}
    special = {table[token] for token in getattr(tokens, "specials", ()) if token in table}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = named if isinstance(named, (list, tuple)) else [named]
    found = sorted({i for i in (tokens.eos, *(i for i in own if i in special)) if i is not None})
    if not found:
        remedy = "give a tokenizer that has an end-of-text token"
        raise DataError("this tokenizer has no token that ends a text", where="tokenizer", remedy=remedy)
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", extra="language") from error
    return transformers
