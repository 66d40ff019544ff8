"""limbeck's own models by name: those of the CRD table, and a few small ones.

The wide pairs of Tian et al., Contrastive Representation Distillation, 2020, arXiv:1910.10699, with parameter counts
and outputs equal to the authors' code. ``ResNet50`` with capitals is the bottleneck net; ``resnet56`` a CIFAR net.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from limbeck.core.errors import ModelError, did_you_mean
from limbeck.models.experts import expert_resnet
from limbeck.models.mlp import MLP
from limbeck.models.mobilenetv2 import MobileNetV2
from limbeck.models.resnet import cifar_resnet, imagenet_resnet
from limbeck.models.shufflenetv1 import ShuffleNetV1
from limbeck.models.shufflenetv2 import ShuffleNetV2
from limbeck.models.text import TextEncoder
from limbeck.models.vgg import VGG
from limbeck.models.vit import ViT
from limbeck.models.wrn import WideResNet

Builder = Callable[..., nn.Module]

_X4 = (32, 64, 128, 256)
_FIXED: dict[str, Builder] = {
    "ResNet18": partial(imagenet_resnet, 18),
    "ResNet34": partial(imagenet_resnet, 34),
    "ResNet50": partial(imagenet_resnet, 50),
    "vgg8": partial(VGG, 8),
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "mlp": MLP,
    "vit_mini": partial(ViT, 64, 4, 4),
    "vit_tiny": partial(ViT, 192, 12, 3),
    "vit_small": partial(ViT, 384, 12, 6),
}
_EXAMPLES = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *(f"resnet{depth}_a" for depth in (20, 32, 44, 56, 110)),
    *("text_64_1", "text_128_4"),
    *("resnet8x4", "resnet32x4", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
)
_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], Builder]], ...] = (
    (r"resnet(\d+)", lambda m: partial(cifar_resnet, int(m[1]))),
    (r"resnet(\d+)_a", lambda m: partial(cifar_resnet, int(m[1]), shortcut="A")),
    (r"resnet(\d+)_experts", lambda m: partial(expert_resnet, int(m[1]))),
    (r"resnet(\d+)x4", lambda m: partial(cifar_resnet, int(m[1]), widths=_X4)),
    (r"wrn_(\d+)_(\d+)", lambda m: partial(WideResNet, int(m[1]), int(m[2]))),
    (r"text_(\d+)_(\d+)", lambda m: partial(TextEncoder, int(m[1]), int(m[2]))),
    (r"mlp((?:_\d+)+)", lambda m: partial(MLP, tuple(int(width) for width in m[1].split("_")[1:]))),
)


def available() -> list[str]:
    """Names that :func:`create` knows; besides these, any fitting depth and width in the names that carry numbers.

    Example:
        >>> [name for name in available() if name.startswith("wrn")]
        ['wrn_16_1', 'wrn_16_2', 'wrn_40_1', 'wrn_40_2']
    """
    return sorted({*_FIXED, *_EXAMPLES}, key=_by_number)


def is_known(name: str) -> bool:
    """Whether a name is one of the zoo's, or has the form of one."""
    return name in _FIXED or any(re.fullmatch(pattern, name) for pattern, _ in _PATTERNS)


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    vocabulary: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model of the zoo; its forward returns logits ``[B, num_classes]``.

    Args:
        name: One of :func:`available`, or ``resnet{6n+2}`` (option B shortcuts, as in the CRD table),
            ``resnet{6n+2}_a`` (option A, as in He et al.), ``resnet{6n+2}_experts`` (see
            :func:`~limbeck.models.experts.expert_resnet`), ``resnet{6n+2}x4``, ``wrn_{6n+4}_{width}``,
            ``mlp_{width}_{width}...``, ``text_{width}_{depth}``.
        num_classes: Number of logits.
        in_channels: Channels of an input image.
        image_size: Height of an input image; ``mlp``, ``vgg`` and ``vit`` must know it and take 32 if not given.
        vocabulary: Number of token ids; ``text`` must know it and takes 20,000 if not given.
        options: The family's own, such as ``shortcut="A"``, ``dropout=0.3`` or ``patch_size=2``.

    Raises:
        ModelError: Unknown name or option, or a number that does not fit the family.

    Example:
        >>> import torch
        >>> create("resnet8", num_classes=7, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 7])
    """
    builder = _builder(name)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "vocabulary": vocabulary}
    for field, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ModelError("it must be a positive whole number", where=field, found=repr(value))
    accepted = inspect.signature(builder).parameters
    given = {key: value for key, value in sizes.items() if value is not None and key in accepted}
    if vocabulary is not None and "vocabulary" not in accepted:
        raise ModelError(
            "this model takes no texts",
            where=name,
            found=f"{vocabulary} token ids",
            remedy="use text_64_1 or a model of your own",
        )
    if options.get("in_features") is not None and "in_features" not in accepted:
        raise ModelError(
            "this model takes images, and these are feature vectors",
            where=name,
            found=f"in_features {options['in_features']}",
            remedy="use mlp or a model of your own",
        )
    settled = {"num_classes", "in_channels", *getattr(builder, "keywords", ())}  # the name has said some of them
    own = [key for key in accepted if key not in settled]
    for key in options:
        if key not in own:
            remedy = did_you_mean(key, own)
            raise ModelError("no such option", where=f"{name}.{key}", wanted=", ".join(own) or "none", remedy=remedy)
    try:
        return builder(**{**given, **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"these options do not make a model: {error}", where=name, found=options) from error


def _builder(name: str) -> Builder:
    capital = name.replace("resnet", "ResNet")
    if capital != name and capital in _FIXED:  # resnet50 could mean either net: 50 is 6n+2
        raise ModelError(f"write {capital!r}: resnet in small letters is a CIFAR net", where=name)
    if name in _FIXED:
        return _FIXED[name]
    for pattern, build in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match:
            return build(match)
    remedy = did_you_mean(name, available()) or "the known ones: " + ", ".join(available())
    raise ModelError("no such model in the zoo", where="model", found=repr(name), remedy=remedy)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts resnet8 before resnet14."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
