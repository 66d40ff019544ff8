"""How well a classifier finds one class among others, such as what a guard shall stop."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.core.errors import DataError
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.data.loader import Loader


def assess_rare(model: nn.Module, loader: Loader, rare: int = 1, *, logits: str | None = None) -> dict[str, float]:
    r"""F1 of a class where it is the likeliest, and the area under its curve of precision over recall.

    .. math:: AP = \frac{1}{|P|} \sum_{i \in P} \frac{|\{ j \in P : s_j \ge s_i \}|}{|\{ j : s_j \ge s_i \}|}

    Args:
        model: A classifier; its mode is as before afterwards.
        loader: Data with a class a sample; those without one (-1) do not count.
        rare: The class, P its samples, s its probability.
        logits: Where they stand in the model's output.

    Returns:
        ``precision``, ``recall``, ``f1`` and ``average_precision``.

    Raises:
        DataError: No sample is of the class.

    >>> from limbeck.data import as_loader
    >>> loader = as_loader((torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0, 0])), batch_size=3)
    >>> assess_rare(nn.Identity(), loader)["average_precision"]
    0.5
    """
    found = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with dry(model):
        for batch in loader.batches():
            scores = logits_of(call_model(model, batch.to(device).inputs), logits).double().softmax(dim=-1)
            labels = batch.require("labels").to(device)
            known = labels >= 0
            rows = scores[:, rare], scores.argmax(dim=-1) == rare, labels == rare
            found.append(torch.stack([row[known].double() for row in rows]).cpu())
    score, said, there = torch.cat(found, dim=1)
    if not bool(there.any()):
        raise DataError("no sample is of this class", where="labels", found=f"{there.numel()} others", wanted=rare)
    right = float((said * there).sum())
    precision, recall = right / max(1.0, float(said.sum())), right / float(there.sum())
    values, place = score.unique(return_inverse=True)  # samples of one score are one step of the curve
    hits = torch.zeros(len(values)).double().index_add_(0, place, there).flip(0).cumsum(0).flip(0)
    every = torch.zeros(len(values)).double().index_add_(0, place, torch.ones_like(there)).flip(0).cumsum(0).flip(0)
    area = float(((hits / every)[place] * there).sum() / there.sum())
    whole = precision + recall
    f1 = 2 * precision * recall / whole if whole else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "average_precision": area}
