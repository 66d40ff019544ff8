"""Memory banks: an embedding kept for every sample of a data set, and negatives drawn from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.hashing import below, draw_bits, key, key_tensor
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import world_size
from limbeck.core.relations import rows, unit


@torch.no_grad()
def update_bank(
    bank: Tensor, index: Tensor, embedding: Tensor, *, momentum: float = 0.5, mask: Tensor | None = None
) -> None:
    r"""Move the rows of these samples towards their new embeddings, in place: :math:`m M_i + (1 - m) a_i`, length 1.

    Args:
        bank: ``[n, D]``.
        index: ``[B]`` rows; of a row that comes twice the last is kept.
        embedding: ``[B, *]``; scaled to length 1 here.
        momentum: ``m``; 0.5 in the paper's code.
        mask: ``[B]`` booleans, True where a sample counts; the rows of others stay.
    """
    embedding, counts = rows(embedding.to(bank.dtype), mask)
    if counts is not None:  # not written back as they were: a sample left out may carry the index of one that counts
        embedding, index = embedding[counts], index[counts]
    bank.index_copy_(0, index, unit(momentum * bank[index] + (1 - momentum) * unit(embedding)))


class NegativeSampler(nn.Module):
    """Draws the rows of negatives: samples of other classes, or any other sample where classes are unknown.

    A draw is a hash of the seed, the step, the sample and the position in the row. So there is no random state to save,
    and a sample gets the same negatives on any device, in any batch, on any rank, and after a resume. Rows are drawn
    with replacement, as noise-contrastive estimation supposes (the authors' loader draws without).

    Args:
        samples: How many rows the bank has.
        labels: ``[samples]`` integer classes; a negative label is a class of its own.
        seed: Of the draws.

    Raises:
        TensorError: Labels that do not fit, or a sample to which no other can be a negative.

    >>> NegativeSampler(4, labels=torch.tensor([0, 0, 1, 0]))(torch.tensor([1]), number=3, step=0)
    tensor([[2, 2, 2]])
    """

    order: Tensor
    begin: Tensor
    length: Tensor
    keys: Tensor

    def __init__(self, samples: int, labels: Tensor | None = None, seed: int = 0) -> None:
        super().__init__()
        if labels is None:
            labels = torch.full((samples,), -1)
        if labels.shape != (samples,) or labels.is_floating_point():
            found = f"{list(labels.shape)} {labels.dtype}"
            raise TensorError("not one class a sample", where="labels", found=found, wanted=f"[{samples}] integers")
        if samples < 2:
            raise TensorError("no negatives to draw", where="samples", found=samples, wanted="two or more")
        # Unlabelled samples become classes of their own; then classes lie in runs of `order`.
        own = labels.long().cpu().clone()
        own[own < 0] = int(own.max()) + 1 + torch.arange(int((own < 0).sum()))
        order = own.argsort(stable=True)
        _, group, sizes = own[order].unique_consecutive(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise TensorError("no negatives to draw", where="labels", found="one class", wanted="two classes or more")
        starts = sizes.cumsum(0) - sizes
        begin, length = torch.empty(samples, dtype=torch.long), torch.empty(samples, dtype=torch.long)
        begin[order], length[order] = starts[group], sizes[group]
        # They follow from labels and seed, so a checkpoint need not hold them.
        for name, value in (("order", order), ("begin", begin), ("length", length), ("keys", key_tensor([key(seed)]))):
            self.register_buffer(name, value, persistent=False)

    def forward(self, index: Tensor, number: int, step: int | Tensor) -> Tensor:
        """``[B, number]`` rows, none of the class of the sample it stands beside."""
        samples = len(self.order)
        begin, length = self.begin[index].unsqueeze(1), self.length[index].unsqueeze(1)
        counter = (step * samples + index).unsqueeze(1) * number + torch.arange(number, device=index.device)
        # Of the rows outside the class; the run of the class itself is then stepped over.
        position = below(draw_bits(self.keys, counter).squeeze(-1), samples - length)
        return self.order[torch.where(position < begin, position, position + length)]


class Banks(nn.Module):
    """Two embeddings of every sample, the student's and the teacher's, as last seen; and negatives drawn from them.

    Banks and the count of steps are saved with the objective that holds them, and negatives follow from these, so a
    resumed run goes on exactly. On several ranks each sees all ranks' new embeddings, so the ranks' batches must be of
    one size.

    Args:
        samples: How many.
        dim: Width of the embeddings.
        labels: ``[samples]`` integer classes, for negatives of other classes only.
        seed: Of the banks' start and of the draws.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    step: Tensor

    def __init__(self, samples: int, dim: int, labels: Tensor | None = None, seed: int = 0) -> None:
        super().__init__()
        self.sampler = NegativeSampler(samples, labels, seed)
        generator = torch.Generator().manual_seed(seed)
        banks = (torch.rand(2, samples, dim, generator=generator) * 2 - 1) * math.sqrt(3 / dim)
        for name, value in (("student_bank", banks[0]), ("teacher_bank", banks[1]), ("step", torch.tensor(0))):
            self.register_buffer(name, value.clone())

    @classmethod
    def of(cls, data: DataInfo, dim: int, seed: int, where: str) -> Banks:
        """Banks for a training set.

        Args:
            where: Who asks, for the error.

        Raises:
            ConfigError: Its size is not known.
        """
        if data.samples is None:
            raise ConfigError(
                f"{where}'s memory bank needs to know how many samples there are",
                where="data.samples",
                remedy="give DataInfo(samples=...) to setup, or compare within the batch where there is such an option",
            )
        return cls(data.samples, dim, data.labels, seed)

    def against(self, index: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both banks as they are now, the samples' rows, and ``[B, number]`` rows of negatives (at most one a sample).

        Raises:
            TensorError: An id beyond the banks; told on the CPU, outside of compiled graphs.
        """
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = index[(index < 0) | (index >= len(self.student_bank))]
            if len(outside):
                raise TensorError(
                    "a sample has no row in the bank",
                    where="batch.index",
                    found=int(outside[0]),
                    wanted=f"0 to {len(self.student_bank) - 1}",
                )
        negatives = self.sampler(index, min(number, len(self.student_bank)), self.step)
        # Copies, since the backward pass reads them when the banks have moved on already. Stacked, since the compiler
        # drops a plain clone and lets the backward pass read the updated bank.
        student_bank, teacher_bank = torch.stack([self.student_bank, self.teacher_bank]).unbind()
        return student_bank, teacher_bank, index, negatives

    def remember(
        self, student: Tensor, teacher: Tensor, index: Tensor, momentum: float, counts: Tensor | None = None
    ) -> None:
        """Move the rows of these samples, of all ranks, towards their new embeddings; a step is over."""
        if counts is None:
            index, student, teacher = everywhere(index, student, teacher)
        else:
            index, student, teacher, counts = everywhere(index, student, teacher, counts)
        update_bank(self.student_bank, index, student, momentum=momentum, mask=counts)
        update_bank(self.teacher_bank, index, teacher, momentum=momentum, mask=counts)
        self.step += 1


def everywhere(*tensors: Tensor) -> list[Tensor]:
    """Rows of all ranks, so that every rank makes the same changes to its banks."""
    if world_size() == 1:
        return list(tensors)
    gathered = []
    for tensor in tensors:
        whole = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, tensor.contiguous())
        gathered.append(whole)
    return gathered
