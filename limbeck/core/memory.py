"""Memory banks: an embedding kept for every sample of a data set, and negatives drawn from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.hashing import below, draw_bits, key, key_tensor
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
