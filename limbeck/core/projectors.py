"""Maps from a student's feature space into the teacher's, sized from one pair of real features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from limbeck.core.errors import TensorError
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import check_floating


class LinearProjector(nn.Linear):
    """A linear layer that takes features of any precision and computes in its own; what does not fit is named."""

    def forward(self, input: Tensor) -> Tensor:
        _check(input, 2, -1, self.in_features)
        return super().forward(input.to(self.weight.dtype))


class ConvProjector(nn.Conv2d):
    """A convolution that takes maps of any precision and computes in its own; what does not fit is named."""

    def forward(self, input: Tensor) -> Tensor:
        _check(input, 4, 1, self.in_channels)
        return super().forward(input.to(self.weight.dtype))


class OrthogonalProjector(nn.Linear):
    """A linear map without bias that keeps lengths and angles, or, where it narrows, has orthonormal rows.

    The weight is a product of orthogonal factors at all times, also after steps of an optimizer: with it, a feature's
    inner products are the teacher-sided vector's, and all that is learned is learned by the student.

    Args:
        in_features, out_features: The two widths.

    >>> layer = OrthogonalProjector(3, 5)
    >>> bool(torch.dist(layer.weight.T @ layer.weight, torch.eye(3)) < 1e-5)
    True
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        # Cayley's map: ten times as fast as torch's default for wide layers, and as exact.
        parametrizations.orthogonal(self, orthogonal_map="cayley")

    @without_autocast
    def forward(self, input: Tensor) -> Tensor:
        _check(input, 2, -1, self.in_features)
        weight = self.weight  # made anew each time it is read
        return F.linear(input.to(weight.dtype), weight)


def _check(feature: Tensor, least: int, dim: int, width: int) -> None:
    check_floating(feature, "student_feature", least)
    if feature.shape[dim] != width:
        raise TensorError(
            "another width than in the dry run",
            where="student_feature",
            found=list(feature.shape),
            wanted=f"{width} channels",
        )


def projector(student_feature: Tensor, teacher_feature: Tensor, *, bias: bool = True) -> nn.Module:
    """A linear map from the student's channels to the teacher's: 1x1 convolution on maps, linear layer elsewhere.

    Args:
        student_feature: ``[B, C_s, H, W]``, ``[B, N, D_s]`` or ``[B, D_s]``.
        teacher_feature: The same kind of feature, with its own width.
        bias: Add a bias.

    Raises:
        TensorError: The two are not the same kind of feature.

    >>> projector(torch.zeros(2, 8, 4, 4), torch.zeros(2, 32, 4, 4))
    ConvProjector(8, 32, kernel_size=(1, 1), stride=(1, 1))
    """
    if student_feature.ndim != teacher_feature.ndim or student_feature.ndim not in (2, 3, 4):
        raise TensorError(
            "no projector leads from this feature to that",
            where="student_feature",
            found=f"{list(student_feature.shape)} to {list(teacher_feature.shape)}",
            wanted="two maps [B, C, H, W], two token rows [B, N, D] or two vectors [B, D]",
        )
    layer: nn.Module
    if student_feature.ndim == 4:
        layer = ConvProjector(student_feature.shape[1], teacher_feature.shape[1], 1, bias=bias)
    else:
        layer = LinearProjector(student_feature.shape[-1], teacher_feature.shape[-1], bias=bias)
    return layer.to(student_feature.device)


def connector(student_feature: Tensor, teacher_feature: Tensor) -> nn.Module:
    """A 1x1 convolution without bias and batch normalisation, from one map's channels to the other's.

    Started as in the code of AB and OFD: normal with variance 2 / (teacher's channels). It serves training alone, so
    the normalisation keeps no running statistics.

    Args:
        student_feature: ``[B, C_s, H, W]``.
        teacher_feature: ``[B, C_t, *]``.

    >>> import torch
    >>> connector(torch.zeros(2, 8, 4, 4), torch.zeros(2, 32, 4, 4))(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 32, 4, 4])
    """
    check_floating(student_feature, "student_feature", least=4)
    width = teacher_feature.shape[1]
    layer = ConvProjector(student_feature.shape[1], width, 1, bias=False)
    nn.init.normal_(layer.weight, std=(2 / width) ** 0.5)
    return nn.Sequential(layer, nn.BatchNorm2d(width, track_running_stats=False)).to(student_feature.device)


class GroupedLinear(nn.Module):
    """A linear map of its own for each window of a map; places of one window share it.

    Args:
        channels: Of the maps that come.
        width: Of those that leave.
        size: Height and width of the maps.
        window: Height and width of a window; at the lower and right edge it may be cut. The whole map: one linear map.

    >>> layer = GroupedLinear(8, 6, (14, 14))
    >>> layer(torch.zeros(2, 8, 14, 14)).shape, layer.weight.shape
    (torch.Size([2, 6, 14, 14]), torch.Size([16, 8, 6]))
    """

    def __init__(self, channels: int, width: int, size: tuple[int, int], window: int = 4) -> None:
        super().__init__()
        self.size, self.window = (int(size[0]), int(size[1])), window
        self.rows, self.columns = -(-self.size[0] // window), -(-self.size[1] // window)
        self.weight = nn.Parameter(torch.empty(self.rows * self.columns, channels, width))
        self.bias = nn.Parameter(torch.empty(self.rows * self.columns, 1, width))
        for parameter in (self.weight, self.bias):  # as nn.Linear
            nn.init.uniform_(parameter, -(channels**-0.5), channels**-0.5)

    def forward(self, feature: Tensor) -> Tensor:
        _check(feature, 4, 1, self.weight.shape[1])
        _check_size(feature, self.size)
        (height, width), window = self.size, self.window
        x = F.pad(feature.to(self.weight.dtype), (0, self.columns * window - width, 0, self.rows * window - height))
        x = x.unflatten(3, (self.columns, window)).unflatten(2, (self.rows, window)).permute(0, 2, 4, 3, 5, 1)
        x = torch.einsum("bgpc,gcd->bgpd", x.flatten(3, 4).flatten(1, 2), self.weight) + self.bias
        x = x.unflatten(1, (self.rows, self.columns)).unflatten(3, (window, window)).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


class CrossAttentionProjector(nn.Module):
    r"""Queries for every place of the teacher ask a student's map: its channels and resolution become the teacher's.

    .. math:: y = \mathrm{LN}\big(W_o\, \mathrm{softmax}(s\, Q K^\top / \sqrt{d_h})\, V\big), \quad
        \mathrm{out} = y + W_2 \mathrm{ReLU}(W_1 y), \quad
        Q = W_q \mathrm{ReLU}(W_p q),\ K, V = W_{k, v}(\mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_3(F))) + \mathrm{pos})

    Two biases of the paper's code are left out, which batch normalisation and softmax take out again. The code has 8
    heads in some recipes, in others 16 for 768 channels and 24 for 1536.

    Source: ScaleKD, arXiv 2411.06786.

    Args:
        student_feature: ``[B, C, H, W]``: an example.
        teacher_feature: ``[B, D, H', W']``: what it becomes.
        learned: The queries are learned; else they come with every call, ``[B, D, H', W']``.
        heads: Of the attention, or as many of them as divide the width; 0: one for every 64 channels.
        sharpness: s, on top of the usual scale.
        bias: Of the last layer; of no use where a loss takes out the mean over places.

    >>> layer = CrossAttentionProjector(torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 3, 3))
    >>> layer(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self,
        student_feature: Tensor,
        teacher_feature: Tensor,
        *,
        learned: bool = True,
        heads: int = 0,
        sharpness: float = 5.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        channels, width = student_feature.shape[1], teacher_feature.shape[1]
        self.size, self.goal = _size(student_feature), _size(teacher_feature)
        self.heads, self.sharpness = math.gcd(heads or max(width // 64, 1), width), sharpness
        self.encode = nn.Sequential(
            ConvProjector(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, track_running_stats=False),  # a helper is only used in training
            nn.ReLU(),
        )
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, *self.size), std=0.02))
        self.queries = nn.Parameter(torch.randn(math.prod(self.goal), width)) if learned else None
        self.ask = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(channels, width, bias=False), nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width, bias=bias))
        self.to(student_feature.device)

    def forward(self, feature: Tensor, queries: Tensor | None = None) -> Tensor:
        _check(feature, 4, 1, self.position.shape[1])
        _check_size(feature, self.size)
        x = (self.encode(feature) + self.position).flatten(2).transpose(1, 2)
        asked = self.queries if queries is None else queries.to(x.dtype).flatten(2).transpose(1, 2)
        assert asked is not None, "a projector without queries of its own is given some"
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for t in (self.query(self.ask(asked)), self.key(x), self.value(x))
        )
        q = q.expand(len(x), *q.shape[-3:])
        y = F.scaled_dot_product_attention(q, k, v, scale=self.sharpness * q.shape[-1] ** -0.5)
        y = self.norm(self.out(y.transpose(1, 2).flatten(2)))
        return (y + self.feed(y)).transpose(1, 2).unflatten(2, self.goal)


def _size(feature: Tensor) -> tuple[int, int]:
    return feature.shape[2], feature.shape[3]


def _check_size(feature: Tensor, size: tuple[int, int]) -> None:
    if tuple(feature.shape[2:]) != size:
        raise TensorError(
            "another resolution than in the dry run",
            where="student_feature",
            found=list(feature.shape),
            wanted=f"{size[0]} x {size[1]} places",
            remedy="train with inputs of one size",
        )
