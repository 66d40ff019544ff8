"""What active learning asks for, against the choices of PCoreSet's authors' code on the same predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.models.heads.dual import dual_log_probabilities
from limbeck.schemes.chosen_data.querying import k_center_greedy

with np.load(Path(__file__).parent / "pcoreset_pcoreset.npz", allow_pickle=False) as file:
    NUMBERS = {k: torch.from_numpy(file[k]) for k in file if "/" in k}


def said(side: str) -> torch.Tensor:
    """The mixture of both heads that they choose by."""
    ce, kd = NUMBERS[f"input/{side}ce"], NUMBERS[f"input/{side}kd"]
    return dual_log_probabilities(ce, kd, alpha=0.5, beta=1.0).exp()


@pytest.mark.parametrize("strategy", ["pcoreset", "uncertainty", "coreset"])
def test_the_authors_choices(strategy: str) -> None:
    wanted = NUMBERS[f"chosen/{strategy}"]
    if strategy == "uncertainty":
        found = torch.special.entr(said("")).sum(dim=1).topk(len(wanted)).indices
    elif strategy == "pcoreset":
        found = k_center_greedy(said(""), said("labelled_"), len(wanted))
    else:  # theirs goes by cosines, which for vectors of length 1 is the same order
        points, centres = (F.normalize(NUMBERS[f"input/{side}features"], dim=1) for side in ("", "labelled_"))
        found = k_center_greedy(points, centres, len(wanted))
    assert torch.equal(found, wanted)
