"""Texts written by encoder-decoders, through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.core.survey import dry
from limbeck.models.generating import _NEVER, Completions, Decoding, _config, _processors, _transformers


def check_answers(model: nn.Module, where: str) -> None:
    """Refuse what is no encoder-decoder that writes.

    Raises:
        ModelError: It is none.
    """
    reads = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not reads or not callable(getattr(model, "generate", None)):
        raise ModelError(
            "this model does not read with an encoder and write with a decoder",
            where=where,
            found=type(model).__name__,
            wanted="an encoder-decoder of transformers, with generate()",
            remedy="use auto: AutoModelForSeq2SeqLM with a type such as t5 or bart",
        )


def answer(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    decoding: Decoding,
    *,
    start: int,
    ends: Sequence[int],
    pad: int,
    size: int | None = None,
    keys: Tensor | None = None,
    where: str = "model",
) -> Completions:
    """What a model writes about each source, in evaluation mode and without gradients.

    As :func:`limbeck.models.generating.write` does it: what is drawn follows from a row's key and the place alone.

    Args:
        model: An encoder-decoder of transformers.
        ids, mask: ``[B, S]`` sources, and True where there is a token.
        decoding: How tokens are chosen.
        start: The token with which the decoder begins; it is not part of what comes back.
        ends: Ids that end a text; each is the last token of its text.
        pad: The id that fills up.
        size: Ids from this on stand for no token, and are never written.
        keys: ``[B]`` integers, one for each row; ``None`` draws them from torch's random state.
        where: The model's name, for messages.

    Raises:
        ModelError: It is no such model.
    """
    check_answers(model, where)
    if keys is None and decoding.draws:
        keys = torch.randint(-(2**62), 2**62, (len(ids),)).to(ids.device)
    begin = torch.full_like(ids[:, :1], start)
    processors, draw = _processors(decoding, begin, torch.ones_like(begin, dtype=torch.bool), keys, None, 0.0)
    vocabulary: Any = getattr(model.config, "vocab_size", size)
    if size is not None and size < vocabulary:
        spare = _transformers().SuppressTokensLogitsProcessor(list(range(size, vocabulary)), device=ids.device)
        processors.insert(0, spare)
    config = _config(decoding, ends, pad)
    config.decoder_start_token_id = start
    with dry(model):
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "logits_processor": processors}
        out = model.generate(generation_config=config, **given)  # type: ignore[operator]
    written = out.sequences[:, 1:]
    is_end = torch.isin(written, torch.tensor(list(ends) or [_NEVER], device=ids.device))
    finished = is_end.any(dim=1)
    lengths = torch.where(finished, is_end.int().argmax(dim=1) + 1, written.shape[1])
    found = Completions(written, lengths, finished)
    found.ids = written.masked_fill(~found.mask, pad)
    if draw is not None:
        found.log_probs = torch.stack(draw.log_probs[: written.shape[1]], dim=1).masked_fill(~found.mask, 0.0)
    return found
