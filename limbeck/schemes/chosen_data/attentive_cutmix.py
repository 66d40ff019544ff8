"""Attentive CutMix: what a model looks at in one image is pasted into another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.divergences import soften
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import below, draw_bits, key, key_tensor
from limbeck.core.labels import soft_labels
from limbeck.core.objective import DataInfo
from limbeck.core.taps import Listener
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.looking import indexed, seen_again
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_PARTNERS = 12  # keeps the draw of partners apart from others


def attention_cells(maps: Tensor, grid: int, patches: int) -> Tensor:
    """Which cells of a grid a feature map is strongest in, ``[B, grid, grid]`` booleans.

    Args:
        maps: ``[B, C, H, W]``; their mean over channels is the attention, averaged (or spread) to the grid.
        grid: Cells on a side.
        patches: How many cells of each image.

    >>> attention_cells(torch.tensor([[[[1.0, 5.0], [0.0, 2.0]]]]), 2, 2)
    tensor([[[False,  True],
             [False,  True]]])
    """
    heat = F.adaptive_avg_pool2d(maps.float().mean(dim=1, keepdim=True), grid).flatten(1)
    cells = torch.zeros_like(heat, dtype=torch.bool)
    if patches:
        cells.scatter_(1, heat.topk(patches, dim=1).indices, True)
    return cells.view(-1, grid, grid)


def paste(images: Tensor, givers: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Images with some cells of others in their places, and the part of the pixels ``[B]`` that was pasted.

    Args:
        images: ``[B, C, H, W]``.
        givers: The same shape; where a cell is chosen, their pixels stand.
        cells: ``[B, G, G]`` booleans; a grid laid over the image, its lines rounded to pixels.

    >>> image, share = paste(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([[[True, False]] * 2]))
    >>> image.flatten().tolist(), share
    ([1.0, 0.0, 1.0, 0.0], tensor([0.5000]))
    """
    height, width = images.shape[-2:]
    row, column = (torch.arange(s, device=images.device) * cells.shape[1] // s for s in (height, width))
    chosen = cells[:, row][:, :, column]
    return torch.where(chosen.unsqueeze(1), givers, images), chosen.float().mean(dim=(1, 2))


@register(
    Card(
        key="attentive_cutmix",
        name="Attentive CutMix",
        title="Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning Based Image Classification",
        year=2020,
        arxiv="2003.13048",
        code="xden2331/attentive_cutmix",
        knowledge="scheme",
        equation=r"\tilde x = M \odot x_a + (1 - M) \odot x_b, \qquad "
        r"\tilde y = \lambda y_a + (1 - \lambda) y_b, \qquad \lambda = N / G^2",
        use="Where CutMix pastes background: the teacher says which patches matter. In distillation it then "
        "labels what came of it.",
        defaults={"grid": "7, the paper's", "patches": "6 of the 49, the paper's"},
        evidence="formula",
        evidence_note="masks, mixed images and labels against plain loops",
        choices=(
            "attention is the mean over channels of the last feature map, brought to the grid; the paper enlarges its "
            "images to 224 pixels so that the map is 7 x 7",
            "the image that gives is any of the set, in the view that it has then, drawn by a hash of view and sample",
            "the labels' share is that of the pixels really pasted; it is N / 49 where the grid divides the image",
            "the teacher sees the mixed image, as teachers of mixup and CutMix do; blend mixes what it says of the "
            "two instead",
        ),
    )
)
class AttentiveCutMix(Scheme):
    r"""One training on images into which the teacher's favourite patches of others are pasted.

    .. math:: \tilde x = M \odot x_a + (1 - M) \odot x_b, \qquad \tilde y = \lambda y_a + (1 - \lambda) y_b

    Args:
        grid: G, cells on a side.
        patches: N, cells that are pasted.
        looks: Who looks: ``None``: the teacher, or the name of a player, which is not trained.
        tap: Where it looks.
        teacher: ``mixed``: it labels the mixed image; ``blend``: its probabilities of the two images are mixed.

    Source: Attentive CutMix, arXiv 2003.13048.

    >>> build = AttentiveCutMix(grid=7, patches=6)
    >>> build.patches / build.grid**2
    0.12244897959183673
    """

    def __init__(
        self,
        grid: int = 7,
        patches: int = 6,
        looks: str | None = None,
        tap: str = "stages:-1",
        teacher: Literal["mixed", "blend"] = "mixed",
    ) -> None:
        if grid < 1 or not 0 <= patches <= grid**2:
            raise ConfigError(
                "the cells are not to be had", where="scheme.patches", found=patches, wanted=f"0 to {max(grid, 0) ** 2}"
            )
        self.grid, self.patches, self.looks, self.tap, self.teacher = grid, patches, looks, tap, teacher

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if self.looks is None:
            teacher = cast.need_teacher("attention is taken of a model: give")
            if not isinstance(teacher, FrozenTeacher):
                raise ConfigError(
                    "a teacher that looks is a model at hand",
                    where="teacher",
                    found=type(teacher).__name__,
                    remedy="give the teacher's model, or a player that looks by scheme.looks",
                )
            model = teacher.model
        else:
            model = cast.player(self.looks)
        distiller = Pasted(cast.student, cast.loss, cast.teacher, logits=cast.logits)
        distiller.look(self, model, indexed(cast.train, "Attentive CutMix"))
        yield Training([Stage("cutmix", distiller, cast.config)])


class Pasted(Distiller):
    """A student of mixed images; see :class:`AttentiveCutMix`."""

    def look(self, scheme: AttentiveCutMix, model: nn.Module, loader: IndexedLoader) -> None:
        """Take the scheme's settings, who looks, and where partners come from."""
        self.scheme, self._loader = scheme, loader
        self._model, self._eyes = (model,), list[Listener]()

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Pasted:
        """Also let the model that looks listen to itself."""
        super().setup(batch, data)
        if not isinstance(batch.inputs, Tensor) or batch.inputs.ndim != 4:
            raise DataError(
                "only images are cut", where="data", found=type(batch.inputs).__name__, wanted="[B, C, H, W]"
            )
        if self.scheme.teacher == "blend" and set(self.loss.teacher_taps) - {"logits"}:
            raise ConfigError(
                "only what a teacher says can be blended",
                where="scheme.teacher",
                found=", ".join(self.loss.teacher_taps),
                remedy="say scheme.teacher: mixed, or a loss of logits alone",
            )
        self._model[0].to(batch.inputs.device).eval()
        self._eyes = [Listener(self._model[0], (self.scheme.tap,), batch.inputs)]
        return self

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        """The batch's images, each with patches of another of the set."""
        index, view = batch.require("index"), batch.view if isinstance(batch.view, int) else 0
        keys = key_tensor([key(_PARTNERS, self._loader.seed, view)], index.device)
        partners = below(draw_bits(keys, index)[..., 0], self._loader.samples)
        giver = seen_again(self._loader, partners, view).to(index.device)
        maps = self._eyes[0](giver.inputs)[self.scheme.tap]
        if maps.ndim != 4:
            raise DataError(
                "attention is taken of a map", where="scheme.tap", found=list(maps.shape), wanted="[B, C, H, W]"
            )
        cells = attention_cells(maps, self.scheme.grid, self.scheme.patches)
        inputs, share = paste(batch.inputs, giver.inputs, cells)
        labels = batch.labels
        if labels is not None and giver.labels is not None:
            classes = self._loader.classes
            if not labels.is_floating_point() and classes is None:
                raise DataError("mixing needs to know how many classes there are", where="data.classes")
            of = share.unsqueeze(1)
            labels = soft_labels(giver.labels, classes or 0) * of + soft_labels(labels, classes or 0) * (1 - of)
        both = {"whole": batch.inputs, "giver": giver.inputs, "share": share}
        extras = {**batch.extras, **({"parts": both} if self.scheme.teacher == "blend" else {})}
        return batch.replace(inputs=inputs, labels=labels, extras=extras)

    def _teach(self, batch: Batch) -> Trace:
        if "parts" not in batch.extras or self.teacher is None or not self.loss.teacher_taps:
            return super()._teach(batch)
        parts = batch.extras["parts"]
        said = [super(Pasted, self)._teach(batch.replace(inputs=parts[name])).logits for name in ("giver", "whole")]
        share = parts["share"].unsqueeze(1)
        blended = torch.logaddexp(soften(said[0]) + share.log(), soften(said[1]) + (1 - share).log())
        return Trace(None, {"logits": blended})

    def close(self) -> None:
        super().close()
        for listener in self._eyes:
            listener.close()
        self._eyes = []

    def settled(self) -> dict[str, object]:
        return dict(vars(self.scheme))
