"""SenseDict: the student learns which of a token's senses the teacher means by it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, reduce
from limbeck.core.schedules import Constant
from limbeck.core.taps import Listener
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.loader import Loader
from limbeck.engine.identity import digest
from limbeck.engine.stage import Stage
from limbeck.models.sense_clusters import Gatherer, k_means, markov_clusters
from limbeck.models.senses import SenseDictionary, likeness
from limbeck.schemes.language.writing import same_tokens
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_FOLDER = "senses"  # in the run's folder
_SENSED = "sensed"  # in a batch's extras: tokens that have senses


def sensedict_skd_loss(
    student_state: Tensor,
    teacher_state: Tensor,
    senses: Tensor,
    there: Tensor | None = None,
    *,
    spare: Literal["out", "zero"] = "out",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the student's choice among a token's senses with the teacher's.

    .. math:: L = \frac 1 N \sum_n - \log \mathrm{softmax}(S_n W h^S_n)_{j_n}, \qquad
        j_n = \arg\max_j (S_n h^T_n)_j

    Args:
        student_state: :math:`W h^S`, ``[N, D]``.
        teacher_state: ``[N, D]``; detached.
        senses: :math:`S`, ``[N, K, D]``.
        there: ``[N, K]`` booleans, False for places without a sense; ``None``: all have one.
        spare: Places without a sense cannot be chosen (``"out"``), or score 0 as in the authors' code (``"zero"``).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the mean of no token is 0.

    Raises:
        TensorError: Shapes that do not fit.

    Source: Wang et al., "Multi-Sense Embeddings for Language Models and Knowledge Distillation", 2025, arXiv
    2504.06036.

    >>> senses = torch.eye(2).unsqueeze(0)
    >>> sensedict_skd_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), senses)
    tensor(3.0486)
    """
    check_floating(student_state, "student_state", least=2)
    check_same_shape(student_state, teacher_state, "student_state", "teacher_state")
    if senses.ndim != 3 or (senses.shape[0], senses.shape[2]) != tuple(student_state.shape):
        wanted = f"[{student_state.shape[0]}, K, {student_state.shape[1]}]"
        raise TensorError(
            "these are not the senses of these tokens", where="senses", found=list(senses.shape), wanted=wanted
        )
    fill = -torch.inf if spare == "out" else 0.0
    own, other = likeness(student_state, senses), likeness(teacher_state.detach(), senses)
    if there is not None:
        own, other = own.masked_fill(~there, fill), other.masked_fill(~there, fill)
    values = -own.log_softmax(dim=1).gather(1, other.argmax(dim=1, keepdim=True)).squeeze(1)
    if reduction == "mean" and not len(values):
        return values.sum()
    return reduce(values, None, reduction)


@register(
    Card(
        key="sensedict_skd",
        name="SenseDict, SKD",
        title="Multi-Sense Embeddings for Language Models and Knowledge Distillation",
        year=2025,
        arxiv="2504.06036",
        code="Qitong-Wang/SenseDict",
        knowledge="scheme",
        equation=r"- \log \mathrm{softmax}(S_v W h^S)_j, \qquad j = \arg\max_i (S_v h^T)_i",
        use="For a small encoder that is to give the teacher's states, up to the few that each token has: the student "
        "with its adaptor and the dictionary takes the teacher's place before the teacher's own head "
        "(limbeck.models.senses.SenseStudent).",
        defaults={
            "most": "1000 states of a token, the authors'",
            "clusters": "20, the authors' for DeBERTa",
            "least": "10, the authors': tokens that are rarer keep their states as they are",
            "cluster": "kmeans, the authors' in their runs; markov has their script's numbers",
            "weight": "1, our choice",
        },
        evidence="parity",
        evidence_note="value and gradient of the loss of a3_traincluster_evalmulti.py, and the choices of "
        "replace_sense, Qitong-Wang/SenseDict@451d877",
        choices=(
            "states of a token are drawn with equal chances; in the authors' code late ones push early ones out",
            "places of a token with fewer senses than another cannot be chosen; in the authors' code they score 0 and "
            "can",
            "a token with fewer states than clusters keeps its states; the authors' k-means refuses it",
            "the recipe's loss is learned beside it, by the student's own head; the authors train by the senses alone "
            "and use the teacher's head, which SenseStudent does",
            "tokens that begin, end or fill up a text have no senses, nor have those named in skip",
            "everything of the student trains; the authors freeze its table of positions",
        ),
        tasks=("language", "text classification"),
        cost="Before training the teacher reads all texts once, and its states are clustered.",
    )
)
class SenseDictSKD(Scheme):
    r"""One training, before which the teacher reads all texts, and what it says of each token becomes a few senses.

    The student's states go through a linear adaptor :math:`W`, which is learned beside it, and are to choose the same
    sense of their token as the teacher's. ``senses/`` of the run's folder gets the dictionary before training, and
    ``student.safetensors`` with the trained adaptor after it, for
    :meth:`~limbeck.models.senses.SenseStudent.read`.

    Args:
        tap: Where the student's states are, ``[B, T, D]``.
        teacher_tap: Where the teacher's are; ``None``: as the student's.
        weight: Of the senses' loss.
        cluster: ``"kmeans"`` or ``"markov"``.
        clusters: Senses of a token, by k-means.
        least: Tokens with fewer states than that keep them as their senses.
        most: States of a token that are looked at.
        half: Keep states and senses in half precision.
        skip: Further token ids without senses.

    Source: Multi-Sense Embeddings for Language Models and Knowledge Distillation, arXiv 2504.06036.

    >>> SenseDictSKD(clusters=5).most
    1000
    """

    def __init__(
        self,
        tap: str = "blocks:-1",
        teacher_tap: str | None = None,
        weight: float = 1.0,
        cluster: Literal["kmeans", "markov"] = "kmeans",
        clusters: int = 20,
        least: int = 10,
        most: int = 1000,
        half: bool = True,
        skip: list[int] = [],  # noqa: B006  never changed
    ) -> None:
        for name, value in (("clusters", clusters), ("least", least), ("most", most), ("weight", weight)):
            check_positive(value, f"scheme.{name}")
        if cluster not in ("kmeans", "markov"):
            raise ConfigError("no such way", where="scheme.cluster", found=repr(cluster), wanted="kmeans or markov")
        self.tap, self.teacher_tap, self.weight = tap, teacher_tap or tap, weight
        self.cluster, self.clusters, self.least, self.most = cluster, clusters, least, most
        self.half, self.skip = half, list(skip)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("senses are those of")
        if not isinstance(teacher, FrozenTeacher):
            raise ConfigError(
                "states of all tokens are asked of a model at hand",
                where="teacher",
                found=type(teacher).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        loader = _token_loader(cast.train)
        skip = self.skip
        if isinstance(loader, LanguageLoader):
            same_tokens(loader, "sensedict_skd")
            tokens = loader.split.tokens
            skip = sorted({*skip, *(t for t in (tokens.bos, tokens.eos, tokens.pad) if t is not None)})
        senses = Senses(self.tap, self.teacher_tap)
        loss = cast.loss + Terms([senses], [Constant(self.weight)], ["senses"])
        distiller = SenseDistiller(cast.student, loss, teacher, logits=cast.logits)
        distiller.skip = tuple(skip)
        yield Training([Stage("sensedict_skd", distiller, cast.config)], train=partial(self._read, cast, distiller))
        if cast.folder is not None and senses.adaptor is not None and senses.dictionary is not None:
            adaptor = {f"adaptor.{name}": value for name, value in senses.adaptor.state_dict().items()}
            senses.dictionary.save(
                cast.folder / _FOLDER / "student.safetensors", skip=torch.tensor(skip).long(), **adaptor
            )

    def _read(self, cast: Cast, distiller: SenseDistiller) -> Loader:
        """The training data, once the dictionary is there."""
        loader, teacher = _token_loader(cast.train), cast.teacher
        assert isinstance(teacher, FrozenTeacher)
        file = None if cast.folder is None else cast.folder / _FOLDER / "dictionary.safetensors"
        if file is not None and file.is_file():
            dictionary = SenseDictionary.load(file)[0]
        else:
            dictionary = self.dictionary(loader, teacher.model, distiller.skip, cast.seed)
            if file is not None:
                dictionary.save(file)
        distiller.take(dictionary)
        return loader

    def dictionary(self, loader: Loader, model: nn.Module, skip: tuple[int, ...], seed: int) -> SenseDictionary:
        """What a model says of every token of the texts, as senses."""
        gatherer = Gatherer(self.most, seed, torch.float16 if self.half else torch.float32)
        listener: Listener | None = None
        model.eval()
        with torch.no_grad():
            for batch in loader.plain():
                model.to(next(t.device for t in batch.inputs.values()))
                if listener is None:
                    listener = Listener(model, [self.teacher_tap], batch.inputs)
                states, ids = listener(batch.inputs)[self.teacher_tap], batch.inputs["input_ids"]
                _check_rows(states, ids, "teacher")
                counts = _tokens_of(batch, skip)
                gatherer.add(ids[counts], states[counts])
        if listener is not None:
            listener.close()
        return SenseDictionary.of((token, self._senses(states)) for token, states in gatherer.groups())

    def _senses(self, states: Tensor) -> Tensor:
        """A token's senses, from what the teacher said of it."""
        if len(states) < max(self.least, self.clusters * (self.cluster == "kmeans") + 1):
            return states
        wide = states.float()
        found = k_means(wide, self.clusters) if self.cluster == "kmeans" else markov_clusters(wide, least=self.least)
        return found.to(states.dtype)


class SenseDistiller(Distiller):
    """Counts tokens that have senses; see :class:`SenseDictSKD`."""

    skip: tuple[int, ...] = ()

    @property
    def senses(self) -> Senses:
        """The term of the senses."""
        found = self.loss.objectives["senses"]
        assert isinstance(found, Senses)
        return found

    def take(self, dictionary: SenseDictionary) -> None:
        """Take the dictionary."""
        self.senses.dictionary = dictionary
        self._print = digest(_Held(dictionary))

    def settled(self) -> dict[str, Any]:
        return {"senses": self._print, "skip": list(self.skip)}

    def made(self, batch: Batch) -> Batch:
        if _SENSED in batch.extras:
            return batch
        ids = batch.inputs["input_ids"]
        counts = _tokens_of(batch, self.skip) & self.senses.known(ids)
        return batch.replace(extras={**batch.extras, _SENSED: counts})

    def prepare(self, batch: Batch) -> Batch:
        return super().prepare(self.made(batch))  # held-out batches are not made


class Senses(Objective):
    """The student's choice of senses; see :func:`sensedict_skd_loss`."""

    contract = Contract(normalizer=_SENSED, at_equal=None, mask=True)
    dictionary: SenseDictionary | None
    adaptor: nn.Module | None

    def __init__(self, tap: str, teacher_tap: str) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (tap,), (teacher_tap,)
        self.dictionary = self.adaptor = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        state, goal = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        for name, value in (("student", state), ("teacher", goal)):
            _check_rows(value, batch.inputs["input_ids"], name)
        if self.adaptor is None:
            self.adaptor = LinearProjector(state.shape[-1], goal.shape[-1]).to(state)

    def known(self, ids: Tensor) -> Tensor:
        """Which tokens have senses: none before the teacher has read the texts."""
        if self.dictionary is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        self.dictionary.to(ids.device)
        return self.dictionary.known(ids)

    @torch.compiler.disable
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        counts = batch.extras[_SENSED]
        own = self.ready("adaptor")(student[self.student_taps[0]][counts])
        if not len(own):
            return own.sum()
        senses, there = self.ready("dictionary").of_tokens(batch.inputs["input_ids"][counts])
        return sensedict_skd_loss(own, teacher[self.teacher_taps[0]][counts].to(own.dtype), senses, there)


class _Held(nn.Module):
    """A dictionary's tensors as a state."""

    def __init__(self, dictionary: SenseDictionary) -> None:
        super().__init__()
        self.register_buffer("senses", dictionary.senses)
        self.register_buffer("first", dictionary.first)


def _token_loader(loader: Loader | None) -> Loader:
    inputs = None if loader is None else loader.example(1).inputs
    if loader is None or not isinstance(inputs, dict) or "input_ids" not in inputs:
        wanted = "texts, whose batches hold input_ids"
        raise DataError(
            "senses are those of tokens", where="scheme sensedict_skd", found=type(inputs).__name__, wanted=wanted
        )
    return loader


def _tokens_of(batch: Batch, skip: tuple[int, ...]) -> Tensor:
    """Which places ``[B, T]`` hold a token that can have senses."""
    ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    if mask is None and "document" in batch.extras:
        mask = batch.extras["document"]  # of packs
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
    return there & ~torch.isin(ids, torch.tensor(skip, dtype=ids.dtype, device=ids.device))


def _check_rows(states: Tensor, ids: Tensor, who: str) -> None:
    if states.ndim != 3 or states.shape[:2] != ids.shape:
        raise TensorError(
            "here is no state for each token",
            where=f"the {who}'s tap",
            found=list(states.shape),
            wanted=f"[{ids.shape[0]}, {ids.shape[1]}, D]",
            remedy="name a place inside the model: tap and teacher_tap",
        )
