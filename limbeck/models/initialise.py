"""How the convolutional families start: He initialisation, as in the papers."""

from __future__ import annotations

import math

from torch import nn


def initialise_(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out) and set every batch normalisation to the identity.

    The fan counts one group, so depthwise convolutions start at the right size. Linear layers keep torch's default.
    Source: He et al., Delving Deep into Rectifiers, 2015, arXiv:1502.01852.

    Example:
        >>> import torch
        >>> conv = nn.Conv2d(32, 64, 3)
        >>> initialise_(conv)
        >>> round(conv.weight.std().item(), 2) == round((2 / (64 * 9)) ** 0.5, 2)
        True
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
