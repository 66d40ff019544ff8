"""Contrastive representation distillation (CRD): tell the teacher's view of a sample from its views of others."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.memory import Banks
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import check_floating, check_positive
from limbeck.core.relations import channel_dim, pooled, project
from limbeck.core.trace import Trace
from limbeck.objectives.parts.contrast import crd_bank_loss, crd_log_z, crd_loss


@register(
    Card(
        key="crd",
        name="CRD",
        title="Contrastive Representation Distillation",
        year=2020,
        arxiv="1910.10699",
        code="HobbitLong/RepDistiller",
        knowledge="relation",
        equation=r"-\log \frac{h(s_i, t_i)}{h(s_i, t_i) + K/n} - \sum_j \log \frac{K/n}{h(s_i, t_j) + K/n} "
        r"+ \text{the same with } s \leftrightarrow t, \quad h(a, m) = e^{a \cdot m / \tau} / Z",
        use="The strongest of its time on CIFAR-100, best together with KD. Needs stable sample ids and two banks of "
        "one embedding a sample; memory='batch' contrasts within the batch and needs neither.",
        defaults={
            "dim": "128, as in the authors' code",
            "negatives": "16384, as in the authors' code; at most one for each sample of the data set",
            "temperature": "0.07, as in the paper",
            "momentum": "0.5, as in the authors' code",
            "tap": "what enters the classifier, as in the paper",
        },
        evidence="parity",
        evidence_note="value, gradients, constants Z and bank updates over three steps with given negatives, of "
        "HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f",
        choices=(
            "Negatives are drawn with replacement, as the paper's noise distribution supposes, by a hash of seed, step "
            "and sample; the authors' loader draws without replacement.",
            "The constants Z are set on the example batch of the set-up, not on the first step.",
            "No epsilon in the logarithms; the code's 1e-7 changes the loss by less than 1e-7 n.",
        ),
        needs=("index", "samples"),
        with_labels={"cross_entropy": 1.0},
        weight=0.8,
        cost="Both banks, one embedding a sample, are copied in every step, so that the compiler may not move them.",
    ),
    crd_loss,
)
class CRD(Objective):
    """Contrastive representation distillation; see ``limbeck.functional.crd_loss`` (within a batch) and
    ``limbeck.objectives.parts.contrast.crd_bank_loss``.

    Banks, constants and the count of steps are saved with the objective, and negatives follow from them, so a resumed
    run goes on exactly. Banks change in training mode only. On several ranks each sees all ranks' new embeddings, so
    the ranks' batches must be of one size.

    Args:
        tap: The feature to embed; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        dim: Width of the embeddings.
        memory: ``"bank"``: against embeddings of the whole data set, as in the paper; ``"batch"``: within the batch.
        negatives: How many for each sample, from the bank.
        temperature: Of the similarities.
        momentum: How much of its old embedding a row of the bank keeps.
        seed: Of the banks' start and of the draws.

    >>> loss = 0.8 * CRD(negatives=4096)
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False)
    embed_student: nn.Linear | None
    embed_teacher: nn.Linear | None
    banks: Banks
    log_z: Tensor

    def __init__(
        self,
        tap: str = "penultimate",
        teacher_tap: str | None = None,
        dim: int = 128,
        memory: Literal["bank", "batch"] = "bank",
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_positive(dim, "dim")
        check_positive(negatives, "negatives")
        if memory not in ("bank", "batch"):
            raise ConfigError("no such memory", where="memory", found=repr(memory), wanted="'bank' or 'batch'")
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.dim, self.memory, self.negatives = dim, memory, negatives
        self.temperature, self.momentum, self.seed = temperature, momentum, seed
        self.embed_student = self.embed_teacher = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s_feature, t_feature = student[self.tap], teacher[self.teacher_tap]
        self.embed_student = nn.Linear(s_feature.shape[channel_dim(s_feature)], self.dim).to(s_feature.device)
        self.embed_teacher = nn.Linear(t_feature.shape[channel_dim(t_feature)], self.dim).to(s_feature.device)
        if self.memory == "bank":
            self.banks = Banks.of(data, self.dim, self.seed, "crd").to(s_feature.device)
            s, t, counts = self._embed(student, teacher, batch.mask)
            against = self.banks.against(batch.require("index"), self.negatives)
            self.register_buffer("log_z", crd_log_z(s, t, *against, temperature=self.temperature, mask=counts))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t, counts = self._embed(student, teacher, batch.mask)
        if self.memory == "batch":
            labels = batch.labels
            classes = labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None
            return crd_loss(s, t, classes, temperature=self.temperature, mask=counts)
        index = batch.require("index")
        against = self.ready("banks").against(index, self.negatives)
        loss = crd_bank_loss(s, t, *against, log_z=self.log_z, temperature=self.temperature, mask=counts)
        if self.training:
            self.banks.remember(s.detach(), t.detach(), index, self.momentum, counts)
        return loss

    def _embed(self, student: Trace, teacher: Trace, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check_floating(student[self.tap], "student_feature", least=2)
        check_floating(teacher[self.teacher_tap], "teacher_feature", least=2)
        s_feature, counts = pooled(student[self.tap], mask)
        t_feature, _ = pooled(teacher[self.teacher_tap].detach(), mask)
        s = project(self.ready("embed_student"), s_feature, "student_feature")
        return s, project(self.ready("embed_teacher"), t_feature, "teacher_feature"), counts
