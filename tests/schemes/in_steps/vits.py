"""Vision transformers of transformers, as small as they can be: a masked autoencoder, and students of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = {"image_size": 8, "num_channels": 1, "patch_size": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-6}


def autoencoder(width: int = 16, seed: int = 1, **more: Any) -> Any:
    """A masked autoencoder with weights of some size, as trained ones have them."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    own = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "decoder_hidden_size": 8}
    own |= {"decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shaken(ViTMAEForPreTraining(ViTMAEConfig(**{**SIZES, **own, **more})))


def student(kind: str = "DeiTForImageClassification", classes: int = 3, seed: int = 0, **more: Any) -> Any:
    """A student of transformers, of this class; ``ViT...`` or ``DeiT...``."""
    import transformers

    own = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": classes}
    config = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shaken(getattr(transformers, kind)(config(**{**SIZES, **own, **more})))


def shaken(model: nn.Module) -> nn.Module:
    """With numbers everywhere, zeros included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def plain(model: nn.Module, folder: Path) -> None:
    """What a run leaves is transformers' own model, whose answer is the mean of its two heads."""
    said = model(torch.zeros(2, 1, 8, 8))
    assert type(model).__name__ == "DeiTForImageClassificationWithTeacher"
    assert said.logits.shape == (2, 10)
    torch.testing.assert_close(said.logits, (said.cls_logits + said.distillation_logits) / 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
