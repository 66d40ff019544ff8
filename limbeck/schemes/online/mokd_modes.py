"""The losses of MOKD and a step of it: views, what averages say of them, and each model's turn."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from typing import cast as known

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.crops import random_crops, recoloured
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.errors import DataError, TensorError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.ranks import Rows, as_on_first, drawn_alike, rows_of_ranks, sum_over_ranks
from limbeck.core.relations import pooled
from limbeck.core.schedules import Constant
from limbeck.core.survey import dry
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace
from limbeck.schemes.parts.view_heads import MLPHead, TokenHead

if TYPE_CHECKING:
    from limbeck.schemes.online.mokd import MOKD


def dino_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    center: Tensor | None = None,
    *,
    size: int,
    teacher_temperature: float | Tensor = 0.04,
    student_temperature: float = 0.1,
) -> Tensor:
    r"""What a teacher says of one view of an image, the student shall say of every other.

    .. math:: \frac{1}{|\{i \ne j\}|} \sum_{i \ne j} \frac 1 B \sum_b
        H\big(\mathrm{softmax}((t_{i} - c) / \tau_t),\ \mathrm{softmax}(s_{j} / \tau_s)\big)

    Args:
        student_scores: ``[V B, K]``, view after view.
        teacher_scores: ``[G B, K]`` of the first views; detached.
        center: :math:`c`, ``[K]``; ``None``: 0.
        size: B.
        teacher_temperature: :math:`\tau_t`.
        student_temperature: :math:`\tau_s`.

    Raises: TensorError: No whole number of views, or nothing but one view of both.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294.

    >>> round(float(dino_loss(torch.zeros(6, 5), torch.zeros(4, 5), size=2)), 4), round(math.log(5), 4)
    (1.6094, 1.6094)
    """
    numbers = [len(scores) // size for scores in (student_scores, teacher_scores)]
    if numbers[0] * size != len(student_scores) or numbers[1] * size != len(teacher_scores) or max(numbers) < 2:
        found = f"{len(student_scores)} and {len(teacher_scores)} rows"
        raise TensorError("not so many views", where="student_scores", found=found, wanted=f"multiples of {size}")
    teacher = teacher_scores.detach() if center is None else teacher_scores.detach() - center
    wanted = soften(teacher, teacher_temperature).exp().unflatten(0, (numbers[1], size))
    said = soften(student_scores, student_temperature).unflatten(0, (numbers[0], size))
    crossed = -torch.einsum("gbk,vbk->gv", wanted, said) / size
    own = torch.eye(numbers[1], numbers[0], dtype=torch.bool, device=crossed.device)
    return crossed.masked_fill(own, 0.0).sum() / (~own).sum()


def search_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    teacher_temperature: float | Tensor = 0.04,
    student_temperature: float = 0.1,
) -> Tensor:
    r"""Cross-entropy with what a search in the other model's features found, row by row, without centering.

    Args:
        student_scores: ``[B, K]``.
        teacher_scores: ``[B, K]``; detached.
        teacher_temperature, student_temperature: As in :func:`dino_loss`.

    >>> search_loss(torch.zeros(2, 4), torch.ones(2, 4))
    tensor(1.3863)
    """
    wanted = soften(teacher_scores.detach(), teacher_temperature).exp()
    return cross_entropy_rows(wanted, soften(student_scores, student_temperature)).mean()


class Heads(Objective):
    """A model's two heads: its helpers while it learns without labels."""

    contract = Contract(decomposes=False, at_equal=None)

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.student_taps = (tap, "penultimate")
        self.mlp: MLPHead | None = None
        self.tokens: TokenHead | None = None


class Modes(Distiller):
    """Student and peer, their heads, and the averages of both; see ``MOKD``."""

    turns = ("student", "peer")
    seed = 0
    centers: Tensor
    sums: Tensor
    counts: Tensor
    last: Tensor

    def __init__(self, student: nn.Module, peer: nn.Module, scheme: MOKD, logits: str | None = None) -> None:
        super().__init__(student, Terms([Heads(scheme.taps[0])], [Constant(1.0)], ["mokd"]), logits=logits)
        self.other = Distiller(peer, Terms([Heads(scheme.taps[1])], [Constant(1.0)], ["mokd"]), logits=logits)
        self.scheme = scheme
        self.averages = nn.ModuleList()
        self._listeners: list[Listener] = []
        sizes = {"centers": (4, scheme.prototypes), "sums": (4, scheme.prototypes), "counts": ()}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("last", torch.full((), -1.0))  # progress at the last step

    @property
    def pair(self) -> tuple[Distiller, Distiller]:
        return self, self.other

    @staticmethod
    def heads_of(one: Distiller) -> Heads:
        return known(Heads, next(iter(one.loss)))

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        one = self.pair[turn == "peer"]
        yield from one.student.parameters()
        yield from one.loss.parameters()

    def settings_of(self, turn: str) -> dict[str, Any]:
        return self.scheme.peer_train if turn == "peer" else {}

    def settled(self) -> dict[str, Any]:
        shapes = {name: list(t.shape) for name, t in self.other.student.state_dict().items()}
        return {**vars(self.scheme), "taps": list(self.scheme.taps), "peer": shapes}

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Modes:
        """Also make heads and averages, once."""
        if not isinstance(batch.inputs, Tensor) or batch.inputs.ndim != 4:
            found = type(batch.inputs).__name__
            raise DataError("its views are crops of images", where="batch.inputs", found=found, wanted="[B, C, H, W]")
        self.close()
        fresh = not self.averages
        copies = [copy.deepcopy(one.student) for one in self.pair] if fresh else []  # before anybody listens to them
        super().setup(batch, data)
        self.other.setup(batch, data)
        if fresh:
            self._make(batch, copies)
        for one, average in zip(self.pair, self._averages(), strict=True):
            taps = self.heads_of(one).student_taps
            self._listeners.append(Listener(average["model"], taps, batch.inputs, logits=self._logits))
        return self

    def _make(self, batch: Batch, copies: list[nn.Module]) -> None:
        with dry(self.student), dry(self.other.student):
            traces = [one.heard(batch) for one in self.pair]
        features = [trace[self.heads_of(one).tap] for one, trace in zip(self.pair, traces, strict=True)]
        widths = [feature.shape[2] for feature in features if feature.ndim == 3]
        scheme = self.scheme
        width = scheme.width or next(iter(widths), 384)
        for one, trace, feature, model in zip(self.pair, traces, features, copies, strict=True):
            heads, read = self.heads_of(one), pooled(trace["penultimate"])[0].shape[1]
            heads.mlp = MLPHead(read, scheme.prototypes, **scheme.mlp)
            heads.tokens = TokenHead(feature, width, scheme.prototypes, **scheme.blocks)
            heads.to(feature.device)
            parts = {"model": model, "mlp": copy.deepcopy(heads.mlp), "tokens": copy.deepcopy(heads.tokens)}
            self.averages.append(nn.ModuleDict(parts).requires_grad_(False))
        self.to(features[0].device).averages.eval()

    def _averages(self) -> list[nn.ModuleDict]:
        return known(list[nn.ModuleDict], list(self.averages))

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        """Views of the images, and what the averages say of them; the first part of a step moves these before."""
        progress, device = float(batch.progress), batch.inputs.device
        self._advance(progress)
        rows = rows_of_ranks(batch.size, device)
        with drawn_alike(device, self.seed, *struct.pack("<d", progress), int(self.counts)):
            views = self._views(batch, rows)
        scores = (*views["mlp"], *views["tokens"])
        self.sums += sum_over_ranks(torch.stack([s.float().sum(dim=0) for s in scores]))
        self.counts += len(scores[0]) // batch.size * rows.whole
        return batch.replace(extras={**batch.extras, "mokd": views})

    def _advance(self, progress: float) -> None:
        """What follows a step: averages follow the models, and centers the scores."""
        last = float(self.last)
        if progress == last:
            return
        if last >= 0:
            as_on_first(buffer for one in self.pair for buffer in one.student.buffers())
            momentum = 1 - (1 - self.scheme.momentum) * (1 + math.cos(math.pi * last)) / 2
            for one, average in zip(self.pair, self._averages(), strict=True):
                heads = self.heads_of(one)
                for name, model in (("model", one.student), ("mlp", heads.mlp), ("tokens", heads.tokens)):
                    _follow(average[name], known(nn.Module, model), 1 - momentum)
            self.centers.lerp_(self.sums / self.counts, 1 - self.scheme.center)
            self.sums.zero_()
            self.counts.zero_()
        self.last.fill_(progress)

    @torch.no_grad()
    def _views(self, batch: Batch, rows: Rows) -> dict[str, Any]:
        """Global and local crops, and the averages' scores of the global ones and tokens of the first."""
        images, scheme, size = batch.inputs, self.scheme, (batch.inputs.shape[2], batch.inputs.shape[3])
        small = size if scheme.local_size is None else (scheme.local_size, scheme.local_size)
        own: dict[str, Any] = {"flip": scheme.flip, "rand": rows.rand}
        wide = [recoloured(random_crops(images, size, (0.4, 1.0), **own), blur=b, rand=rows.rand) for b in (1.0, 0.1)]
        near = random_crops(images.repeat(scheme.local_crops, 1, 1, 1), small, (0.05, 0.4), **own)
        views: dict[str, Any] = {"global": torch.cat(wide), "local": recoloured(near, blur=0.5, rand=rows.rand)}
        views |= {"mlp": [], "tokens": [], "searched": []}
        for one, average, listener in zip(self.pair, self._averages(), self._listeners, strict=True):
            trace = listener(views["global"])
            feature = trace[self.heads_of(one).tap]
            views["mlp"].append(average["mlp"](pooled(trace["penultimate"])[0]))
            views["tokens"].append(average["tokens"](feature)[0])
            views["searched"].append(feature[: len(images)])
        progress = torch.as_tensor(batch.progress, dtype=torch.float32)
        views["learns"] = bool(progress >= scheme.frozen)
        low, high = scheme.temperatures
        views["temperatures"] = [
            low + (high - low) * ((progress / part).clamp(max=1.0) if part else torch.ones_like(progress))
            for part in scheme.warmup
        ]
        return views

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        views = batch.extras.get("mokd")
        if views is None:  # it is judged, always on the same crops
            with torch.random.fork_rng(devices=[batch.inputs.device] if batch.inputs.is_cuda else []):
                torch.manual_seed(0)
                views = self._views(batch, Rows((batch.size,)))
        number, size = int(turn == "peer"), batch.size
        one, other, learns = self.pair[number], 1 - number, views["learns"]
        heads = self.heads_of(one)
        traces = [one.heard(batch.replace(inputs=views[name])) for name in ("global", "local")]
        asked = known(MLPHead, heads.mlp)
        mlp = torch.cat([asked(pooled(trace["penultimate"])[0], learns) for trace in traces])
        near, query = self._tokens(heads, traces[1], learns)
        tokens = torch.cat([self._tokens(heads, traces[0], learns)[0], near])
        with torch.no_grad():
            searched = views["searched"][other]
            searched = searched.repeat(self.scheme.local_crops, *[1] * (searched.ndim - 1))
            found = self._averages()[other]["tokens"](searched, query.detach())[0]
        own, crossed = views["temperatures"][number], views["temperatures"][1]
        weight, share = self.scheme.weights[number], batch.share("samples")
        centers = self.centers
        values = {
            "self_mlp": dino_loss(mlp, views["mlp"][number], centers[number], size=size, teacher_temperature=own),
            "self_tokens": dino_loss(
                tokens, views["tokens"][number], centers[2 + number], size=size, teacher_temperature=own
            ),
            "cross_mlp": weight
            * dino_loss(mlp, views["mlp"][other], centers[other], size=size, teacher_temperature=crossed),
            "cross_search": weight * search_loss(near, found, teacher_temperature=crossed),
        }
        values = {f"mokd/{name}": value * share for name, value in values.items()}
        total = torch.stack(list(values.values())).sum()
        terms = {name: value.detach() for name, value in values.items()}
        return Losses(total, terms, {"mokd": torch.ones_like(total)})

    @staticmethod
    def _tokens(heads: Heads, trace: Trace, learns: bool) -> tuple[Tensor, Tensor]:
        return known(TokenHead, heads.tokens)(trace[heads.tap], None, learns)

    def train(self, mode: bool = True) -> Modes:
        super().train(mode)
        self.averages.eval()
        return self

    def close(self) -> None:
        super().close()
        self.other.close()
        for listener in self._listeners:
            listener.close()
        self._listeners = []


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, share: float) -> None:
    """Move an average a part of the way to its model; counters are copied."""
    own, new = average.state_dict(), model.state_dict()
    for name, value in own.items():
        if value.is_floating_point():
            value.lerp_(new[name].to(value.dtype), share)
        else:
            value.copy_(new[name])
