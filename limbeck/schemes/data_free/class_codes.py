"""A vector for each class to begin an input from, of its name or of chance, and noise of several kinds around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.models.libraries import from_transformers

#: Noise of mean 0 and deviation 1, by kind, in the order in which sources are taken.
KINDS = ("gaussian", "uniform", "laplace", "masked")


def orthogonal_codes(classes: int, width: int) -> Tensor:
    """Random vectors of length 1 that are orthogonal to one another, ``[C, max(width, C)]``.

    >>> codes = orthogonal_codes(3, 8)
    >>> torch.allclose(codes @ codes.T, torch.eye(3), atol=1e-6)
    True
    """
    return torch.nn.init.orthogonal_(torch.empty(classes, max(width, classes)))


@torch.no_grad()
def text_codes(names: Sequence[str], model: str, prompt: str = "a photo of a {}") -> Tensor:
    """What a text encoder says of each class's name, ``[C, D]`` of length 1.

    Args:
        names: Of the classes.
        model: A folder or name as transformers knows it: CLIP and its kind by what they compare with images, any other
            text model by the mean of its last states.
        prompt: With ``{}`` in the place of the name.

    Raises:
        ModelError, ConfigError: Model or tokenizer cannot be read.
    """
    encoder: Any = from_transformers(model, {}, "AutoModel", True, {}).eval()
    from transformers import AutoTokenizer  # takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"its tokenizer cannot be read: {reason}", where="scheme.text", found=model) from error
    texts = tokenizer([prompt.format(name) for name in names], padding=True, return_tensors="pt")
    texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
    if hasattr(encoder, "get_text_features"):
        found = encoder.get_text_features(**texts)
        found = found if isinstance(found, Tensor) else found.pooler_output
    else:
        mask = texts["attention_mask"].unsqueeze(-1)
        found = (encoder(**texts).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return F.normalize(found.float(), dim=1)


def diffused(codes: Tensor, degree: Tensor, sources: int = 4) -> Tensor:
    r"""Codes with noise around them, :math:`v = e + \sigma \epsilon / \sqrt D`: at degree 1 the noise is as long as the
    code.

    Row by row the noise is of another kind, in turn: Gaussian, uniform, Laplace, Gaussian of which half is masked.

    Args:
        codes: ``[B, D]`` of length 1.
        degree: :math:`\sigma`, ``[B]``.
        sources: How many kinds, 1 to 4.

    >>> codes = torch.eye(4)
    >>> torch.equal(diffused(codes, torch.zeros(4)), codes)
    True
    """
    normal = torch.randn_like(codes)
    spread = torch.rand_like(codes)
    laplace = -torch.log(torch.rand_like(codes).clamp(min=1e-30)) * 0.5**0.5 * torch.where(spread < 0.5, -1.0, 1.0)
    kinds = torch.stack([normal, (2 * spread - 1) * 3**0.5, laplace, normal * (spread < 0.5) * 2**0.5])
    rows = torch.arange(len(codes), device=codes.device)
    noise = kinds[rows % sources, rows]
    return codes + degree.unsqueeze(1) * noise / codes.shape[1] ** 0.5
