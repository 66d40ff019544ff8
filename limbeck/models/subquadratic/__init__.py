"""Language models whose cost grows with the length of a text, not with its square; made to learn from transformers.

They are models of transformers (``generate``, ``save_pretrained``, ``from_pretrained``), of a class that is limbeck's:
a folder of one is read by :func:`limbeck.models.load_model`, or by ``AutoModelForCausalLM`` once this has been
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.core.errors import MissingExtra, ModelError, did_you_mean

__all__ = ["subquadratic"]


def subquadratic(
    vocabulary: int = 32000,
    mixers: str | list[str] = "gla",
    marks: Mapping[str, int | None] | None = None,
    **options: Any,
) -> Any:
    """A new model with random weights.

    Args:
        vocabulary: Number of token ids.
        mixers: What mixes tokens, in all layers or by layer; see :mod:`~limbeck.models.subquadratic.mixers`.
        marks: Ids of the tokens that begin, end and fill up a text (``bos``, ``eos``, ``pad``).
        options: More of :class:`~limbeck.models.subquadratic.model.SubquadraticConfig`, called as in Llama's.

    Raises:
        ModelError: No such mixer or option, or sizes that do not fit each other.
        MissingExtra: transformers is not installed.

    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> import torch
    >>> subquadratic(20, ["gla", "attention"], **sizes)(torch.tensor([[3, 4, 5]])).logits.shape
    torch.Size([1, 3, 20])
    """
    home = _home()
    usual = home.SubquadraticConfig().to_dict()
    for name in options:
        if name not in usual:
            raise ModelError("no such option", where=f"subquadratic.{name}", remedy=did_you_mean(name, usual))
    told = {f"{mark}_token_id": number for mark, number in (marks or {}).items()}
    config = home.SubquadraticConfig(vocab_size=vocabulary, mixers=mixers, **{**told, **options})
    home.check_sizes(config)
    return home.SubquadraticForCausalLM(config)


def _home() -> Any:
    try:
        from limbeck.models.subquadratic import model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise MissingExtra("transformers", extra="language") from error
    return model
