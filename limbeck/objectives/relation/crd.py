"""Contrastive representation distillation (CRD): tell the teacher's view of a sample from its views of others."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.memory import NegativeSampler, update_bank
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, reduce, widen
from limbeck.core.relations import channel_dim, pooled, project, rows, unit
from limbeck.core.trace import Trace


@without_autocast
def crd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrast within a batch: each sample's two embeddings against those of the batch's other samples.

    .. math::
        L_i = -\log \frac{e^{s_i \cdot t_i / \tau}}{\sum_{j \in N(i)} e^{s_i \cdot t_j / \tau}}
              -\log \frac{e^{s_i \cdot t_i / \tau}}{\sum_{j \in N(i)} e^{s_j \cdot t_i / \tau}},
        \qquad s, t \text{ of length } 1

    :math:`N(i)` is the sample and every other that counts; with labels, only samples of other classes. This needs no
    memory bank, and no more than one batch; the paper's own loss is ``crd_bank_loss``.

    The loss ties the samples of a batch together: the loss of a batch is not the mean of the losses of its parts. A
    sample without negatives costs 0.

    Args:
        student_embedding: ``[B, D]`` (``[B, *]`` is flattened); scaled to length 1 here.
        teacher_embedding: The same shape. *Not* detached, since the teacher's projector learns too: detach the
            teacher's feature before projecting it.
        labels: ``[B]`` integers; a negative label is a class of its own.
        temperature: :math:`\tau`; 0.07 in the paper.
        mask: ``[B]`` booleans, True where a sample counts; or over the first dimensions of the embeddings.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Embeddings of different shapes, or labels that are not one integer a sample.
        ConfigError: A temperature that is not above zero.

    Source:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, arXiv 1910.10699; the form within a
        batch is InfoNCE (arXiv 1807.03748) taken both ways.

    Example:
        >>> import torch
        >>> crd_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.6265)
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    check_positive(temperature, "temperature")
    size = len(student)
    positive = torch.eye(size, dtype=torch.bool, device=student.device)
    negative = ~positive
    if counts is not None:
        negative = negative & counts
    if labels is not None:
        if labels.shape != (size,) or labels.is_floating_point():
            found = f"{list(labels.shape)} {labels.dtype}"
            raise TensorError("not one class a sample", where="labels", found=found, wanted=f"[{size}] integers")
        negative = negative & ((labels.unsqueeze(0) != labels.unsqueeze(1)) | (labels < 0))
    scores = student @ teacher.T / temperature
    allowed = positive | negative
    to_teachers = scores.masked_fill(~allowed, -math.inf).logsumexp(dim=1)
    to_students = scores.T.masked_fill(~allowed, -math.inf).logsumexp(dim=1)
    return reduce(to_teachers + to_students - 2 * scores.diagonal(), counts, reduction)


@without_autocast
def crd_bank_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    *,
    log_z: Tensor,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The paper's loss: noise-contrastive estimation against negatives from memory banks.

    .. math::
        L_i &= \ell_i(s_i, M^T, Z_S) + \ell_i(t_i, M^S, Z_T), \qquad s, t \text{ of length } 1 \\
        \ell_i(a, M, Z) &= -\log \frac{h(a, M_i)}{h(a, M_i) + K / n}
            - \sum_{j \in N(i)} \log \frac{K / n}{h(a, M_j) + K / n}, \qquad h(a, m) = \frac{e^{a \cdot m / \tau}}{Z}

    Each side is compared with the other side's bank of ``n`` rows; ``K`` negatives are drawn for each sample. The
    authors' code adds 1e-7 to both denominators, which moves the loss by less than :math:`10^{-7} n`; here logarithms
    make that unnecessary.

    Args:
        student_embedding: ``[B, D]`` (``[B, *]`` is flattened); scaled to length 1 here.
        teacher_embedding: The same shape. *Not* detached, since the teacher's projector learns too: detach the
            teacher's feature before projecting it.
        student_bank, teacher_bank: ``[n, D]``: the embeddings of all samples, as last seen; no gradient flows there.
        index: ``[B]``: which rows are those of these samples.
        negatives: ``[B, K]``: rows of the negatives.
        log_z: ``[2]``: logarithms of :math:`Z_S` and :math:`Z_T`; the paper sets them once, see ``crd_log_z``.
        temperature: :math:`\tau`; 0.07 in the paper.
        mask: ``[B]`` booleans, True where a sample counts; or over the first dimensions of the embeddings.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes that do not belong together.
        ConfigError: A temperature that is not above zero.

    Source:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, arXiv 1910.10699, equations 17 to 19.

    Example:
        >>> import torch
        >>> bank, index, negatives = torch.eye(3), torch.tensor([0]), torch.tensor([[1, 2]])
        >>> embedding = torch.tensor([[1.0, 0.0, 0.0]])
        >>> log_z = crd_log_z(embedding, embedding, bank, bank, index, negatives)
        >>> crd_bank_loss(embedding, embedding, bank, bank, index, negatives, log_z=log_z)
        tensor(1.0217)
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    wanted = _bank_rows(student, student_bank, teacher_bank, index, negatives)
    check_positive(temperature, "temperature")
    log_noise = math.log(negatives.shape[1] / len(student_bank))  # log of K / n
    values = student.new_zeros(len(student))
    for anchor, bank, log_z_side in ((student, teacher_bank, log_z[0]), (teacher, student_bank, log_z[1])):
        odds = _scores(anchor, bank, wanted, temperature) - log_z_side - log_noise  # log of h / (K / n)
        values = values - F.logsigmoid(odds[:, 0]) - F.logsigmoid(-odds[:, 1:]).sum(dim=1)
    return reduce(values, counts, reduction)


@torch.no_grad()
@without_autocast
def crd_log_z(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Logarithms of the constants that make ``h`` a probability on average: ``[2]``, for student and teacher.

    .. math:: Z = n \cdot \mathrm{mean}_{i,\, j \in \{i\} \cup N(i)}\; e^{a_i \cdot m_j / \tau}

    The paper estimates them on the first batch and keeps them. Arguments are those of ``crd_bank_loss``.
    """
    student, teacher, counts = _embeddings(student_embedding, teacher_embedding, mask)
    wanted = _bank_rows(student, student_bank, teacher_bank, index, negatives)
    sides = []
    for anchor, bank in ((student, teacher_bank), (teacher, student_bank)):
        scores = _scores(anchor, bank, wanted, temperature)
        number = scores.new_tensor(scores.numel()) if counts is None else counts.sum() * scores.shape[1]
        if counts is not None:
            scores = scores.masked_fill(~counts.unsqueeze(1), -math.inf)
        sides.append(scores.flatten().logsumexp(dim=0) - number.log() + math.log(len(bank)))
    return torch.stack(sides)


def _embeddings(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit rows of both, and which samples count."""
    check_floating(student, "student_embedding", least=2)
    check_floating(teacher, "teacher_embedding", least=2)
    check_same_shape(student, teacher, "student_embedding", "teacher_embedding")
    student, counts = rows(widen(student), mask)
    teacher, _ = rows(teacher.to(student.dtype), mask)
    return unit(student), unit(teacher), counts


def _bank_rows(
    embedding: Tensor, student_bank: Tensor, teacher_bank: Tensor, index: Tensor, negatives: Tensor
) -> Tensor:
    """``[B, 1 + K]``: the row of each sample, then those of its negatives."""
    check_same_shape(student_bank, teacher_bank, "student_bank", "teacher_bank")
    size, width = embedding.shape
    for tensor, name, fits, wanted in (
        (student_bank, "student_bank", student_bank.shape[1:] == (width,), f"[n, {width}]"),
        (index, "index", index.shape == (size,) and not index.is_floating_point(), f"[{size}] integers"),
        (negatives, "negatives", negatives.ndim == 2 and negatives.shape[0] == size, f"[{size}, K] integers"),
    ):
        if not fits:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise TensorError("does not belong to these embeddings", where=name, found=found, wanted=wanted)
    return torch.cat([index.unsqueeze(1), negatives], dim=1)


def _scores(anchor: Tensor, bank: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """``[B, 1 + K]`` similarities over temperature.

    One product with the whole bank and a look-up read far less memory than copying ``B (1 + K)`` rows out of it.
    """
    return (anchor @ bank.detach().to(anchor.dtype).T).gather(1, wanted) / temperature


def _everywhere(*tensors: Tensor) -> list[Tensor]:
    """Rows of all ranks, so that every rank makes the same changes to its banks."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    gathered = []
    for tensor in tensors:
        whole = tensor.new_empty(dist.get_world_size() * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous())
        gathered.append(whole)
    return gathered


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
    ),
    crd_loss,
)
class CRD(Objective):
    """Contrastive representation distillation; see ``limbeck.functional.crd_loss`` and ``crd_bank_loss`` beside it.

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
    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    step: Tensor

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
        if self.memory == "batch":
            return
        if data.samples is None:
            raise ConfigError(
                "a memory bank needs to know how many samples there are",
                where="data.samples",
                remedy="give DataInfo(samples=...) to setup, or take CRD(memory='batch')",
            )
        self.sampler = NegativeSampler(data.samples, data.labels, self.seed).to(s_feature.device)
        generator = torch.Generator().manual_seed(self.seed)
        banks = (torch.rand(2, data.samples, self.dim, generator=generator) * 2 - 1) * math.sqrt(3 / self.dim)
        for name, value in (("student_bank", banks[0]), ("teacher_bank", banks[1]), ("step", torch.tensor(0))):
            self.register_buffer(name, value.clone().to(s_feature.device))
        s, t, counts = self._embed(student, teacher, batch.mask)
        arguments = self._against_banks(s, t, batch)
        self.register_buffer("log_z", crd_log_z(*arguments, temperature=self.temperature, mask=counts))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t, counts = self._embed(student, teacher, batch.mask)
        if self.memory == "batch":
            labels = batch.labels
            classes = labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None
            return crd_loss(s, t, classes, temperature=self.temperature, mask=counts)
        arguments = self._against_banks(s, t, batch)
        loss = crd_bank_loss(*arguments, log_z=self.log_z, temperature=self.temperature, mask=counts)
        if self.training:
            self._remember(s.detach(), t.detach(), batch.require("index"), counts)
        return loss

    def _embed(self, student: Trace, teacher: Trace, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check_floating(student[self.tap], "student_feature", least=2)
        check_floating(teacher[self.teacher_tap], "teacher_feature", least=2)
        s_feature, counts = pooled(student[self.tap], mask)
        t_feature, _ = pooled(teacher[self.teacher_tap].detach(), mask)
        s = project(self.ready("embed_student"), s_feature, "student_feature")
        return s, project(self.ready("embed_teacher"), t_feature, "teacher_feature"), counts

    def _against_banks(self, s: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        index = batch.require("index")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = index[(index < 0) | (index >= len(self.student_bank))]
            if len(outside):
                raise TensorError(
                    "a sample has no row in the bank",
                    where="batch.index",
                    found=int(outside[0]),
                    wanted=f"0 to {len(self.student_bank) - 1}",
                )
        negatives = self.sampler(index, min(self.negatives, len(self.student_bank)), self.step)
        # Copies, since the backward pass reads them when the banks have moved on already. Stacked, since the compiler
        # drops a plain clone and lets the backward pass read the updated bank.
        student_bank, teacher_bank = torch.stack([self.student_bank, self.teacher_bank]).unbind()
        return s, t, student_bank, teacher_bank, index, negatives

    def _remember(self, s: Tensor, t: Tensor, index: Tensor, counts: Tensor | None) -> None:
        if counts is None:
            index, s, t = _everywhere(index, s, t)
        else:
            index, s, t, counts = _everywhere(index, s, t, counts)
        update_bank(self.student_bank, index, s, momentum=self.momentum, mask=counts)
        update_bank(self.teacher_bank, index, t, momentum=self.momentum, mask=counts)
        self.step += 1
