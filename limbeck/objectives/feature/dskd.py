"""Dual-space knowledge distillation (DSKD): predictions compared in the student's space and in the teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import DataError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import check_positive, fit_mask
from limbeck.core.trace import Trace
from limbeck.objectives.parts.dual_space import Side, dual_space_parts


@without_autocast
def dskd_loss(
    student_side: Side, teacher_side: Side, maps: nn.ModuleDict, *, temperature: float = 2.0, aligned: bool = False
) -> Tensor:
    r"""Hidden states of each model mapped into the other's space, and made predictions there by the other's head.

    .. math::
        L = \underbrace{\mathrm{CE}\left( \hat z, y \right)}_{\text{learns the map}}
            + [\hat y = y]\, \mathrm{KL}\left( \hat p \,\|\, q \right) + \mathrm{KL}\left( p \,\|\, \tilde q \right),
        \qquad \hat z = W^S P^{t \to s}(A H^T), \quad \tilde z = W^T P^{s \to t}(A^\top H^S)

    all predictions at temperature T. Where the tokenizers differ, places are matched by attention :math:`A` between
    what each reads and predicts, in embeddings of either model; then the first divergence counts only where the mapped
    teacher is right. With one tokenizer each place is matched with itself.

    Args:
        student_side: What the student says; its head and embeddings carry no gradient.
        teacher_side: What the teacher says; detached.
        maps: Linear layers ``t2s``, ``s2t`` and, where places are not aligned, ``query``: the learned maps.
        temperature: T; 2 in the authors' scripts. There is no factor T^2.
        aligned: Both have one tokenizer.

    Raises:
        TensorError: Shapes that do not fit.
        ConfigError: A temperature that is not above zero.

    Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models", 2024, arXiv 2406.17328.

    >>> import torch
    >>> counts, eye = torch.tensor([[True]]), torch.eye(2)
    >>> side = Side(eye[None, :1], 5 * eye[None, :1], 5 * eye, eye[None, :1], eye, torch.tensor([[0]]), counts)
    >>> identity = nn.ModuleDict({"t2s": nn.Identity(), "s2t": nn.Identity()})
    >>> dskd_loss(side, side, identity, aligned=True)
    tensor(0.0067)
    """
    check_positive(temperature, "temperature")
    teacher_side = Side(*(t.detach() for t in teacher_side))
    parts = [*dual_space_parts(student_side, teacher_side, maps, temperature, aligned).values()]
    return sum(parts[1:], parts[0])


@register(
    Card(
        key="dskd",
        name="DSKD",
        title="Dual-Space Knowledge Distillation for Large Language Models",
        year=2024,
        arxiv="2406.17328",
        code="songmzhang/DSKD",
        knowledge="feature",
        equation=r"\mathrm{CE}(\hat z, y) + [\hat y = y]\,\mathrm{KL}(\hat p \| q) + \mathrm{KL}(p \| \tilde q)",
        use="For language models, above all with different tokenizers, where both can be looked into: attention "
        "between the models finds out which places belong together.",
        defaults={"temperature": "2, as in the authors' scripts"},
        evidence="parity",
        evidence_note="value and gradients of songmzhang/DSKD@077337a, with and without cross-model attention",
        choices=(
            "Standard deviations are those of the places that count; the authors' have padding in them.",
            "The authors train the maps with a learning rate of their own, 0.001 beside the student's 0.0005.",
            "With one tokenizer there is no attention, as in the authors' plain variant.",
        ),
        needs=("labels", "teacher_labels", "teacher_mask"),
        tasks=("language", "cross-tokenizer"),
        with_labels={"cross_entropy": 0.5},
        weight=0.5,
    ),
    dskd_loss,
)
class DSKD(Objective):
    """Dual-space distillation, a part of the loss each; see ``limbeck.functional.dskd_loss``.

    Args:
        temperature: T.

    >>> loss = 0.5 * DSKD()
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True, decomposes=False, stop_gradient=True)
    student_taps = teacher_taps = ("logits@in", "logits", "logits@weight", "embeddings:0", "embeddings:0@weight")
    maps: nn.ModuleDict | None

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature, self.maps = temperature, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, other = (trace["logits@in"].shape[-1] for trace in (student, teacher))
        read, seen = (trace["embeddings:0"].shape[-1] for trace in (student, teacher))
        maps: dict[str, nn.Module] = {"t2s": LinearProjector(other, own), "s2t": LinearProjector(own, other)}
        if batch.teacher_inputs is not None:
            if seen != other:
                wanted = f"{other}, the width of its last layer"
                raise TensorError("embeddings of another width", where="teacher", found=seen, wanted=wanted)
            maps["query"] = LinearProjector(2 * read, 2 * seen)
        self.maps = nn.ModuleDict(maps).to(student["logits@in"].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        maps: nn.ModuleDict = self.ready("maps")
        aligned = batch.teacher_inputs is None
        labels, others = batch.require("labels"), batch.extras.get("teacher_labels")
        counts, other_counts = None if batch.mask is None else batch.mask, batch.extras.get("teacher_mask")
        if aligned:
            others, other_counts = labels, counts
        if others is None:
            remedy = "use data of limbeck.data.language with the teacher's tokenizer"
            raise DataError("nothing says what the teacher's places predict", where="teacher_labels", remedy=remedy)
        own, other = _side(student, labels, counts), _side(teacher, others, other_counts)
        other = Side(*(t.detach() for t in other))
        return without_autocast(dual_space_parts)(own, other, maps, self.temperature, aligned)


def _side(trace: Trace, labels: Tensor, mask: Tensor | None) -> Side:
    feature, logits, head, read, table = (trace[tap] for tap in DSKD.student_taps)
    label, known = class_labels(labels, logits.shape[-1], "DSKD")
    counts = known if mask is None else known & fit_mask(mask, known)
    return Side(feature, logits, head[: logits.shape[-1]], read, table, label, counts)
