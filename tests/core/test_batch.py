"""Counting what a batch holds, its share of the step, and moving it about."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch

from limbeck.core.batch import Batch, Unit, batch_size_of, map_tensors
from limbeck.core.errors import DataError


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_plain_classifier_counts_samples() -> None:
    batch = Batch(torch.zeros(3, 8), labels=torch.tensor([0, 1, 2]))
    assert batch.count("samples") == batch.count("positions") == batch.count("labels") == 3


def test_mask_and_missing_labels_are_not_counted() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    labels = torch.tensor([[5, -100, 7], [-1, 2, 3]])
    batch = Batch(torch.zeros(2, 3), labels=labels, mask=mask)
    assert batch.count("samples") == 2
    assert batch.count("positions") == 3
    assert batch.count("labels") == 1


def test_a_mask_over_positions_leaves_labels_of_samples_alone() -> None:
    batch = Batch(torch.zeros(2, 3), labels=torch.tensor([1, 0]), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert batch.count("labels") == 2


def test_soft_labels_count_where_the_mask_does() -> None:
    batch = Batch(torch.zeros(3, 8), labels=torch.full((3, 4), 0.25), mask=torch.tensor([True, False, True]))
    assert batch.count("labels") == 2


def test_unknown_unit_and_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match="'pixels'.*'samples', 'positions' or 'labels'"):
        Batch(torch.zeros(2, 3)).count("pixels")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"batch\.labels: .*the batch has none"):
        Batch(torch.zeros(2, 3)).count("labels")


def test_without_totals_a_batch_is_the_whole_step() -> None:
    assert Batch(torch.zeros(2, 3)).share("samples") == 1.0


@pytest.mark.parametrize("unit", ["samples", "positions", "labels"])
def test_shares_of_uneven_parts_sum_to_one(unit: Unit) -> None:
    lengths, sizes = torch.tensor([4, 1, 0, 3, 2]), [1, 3, 1]
    mask = torch.arange(4) < lengths[:, None]
    labels = torch.where(torch.arange(4) == 1, -100, torch.arange(4)).expand(5, 4)
    whole = Batch(torch.zeros(5, 4), labels=labels, mask=mask)
    totals = {unit: whole.count(unit)}
    parts = [
        Batch(i, labels=y, mask=m, totals=totals)
        for i, y, m in zip(whole.inputs.split(sizes), labels.split(sizes), mask.split(sizes), strict=True)
    ]
    shares = [float(part.share(unit)) for part in parts]
    assert len(set(shares)) > 1
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(4, 2),
        (torch.zeros(4, 2), torch.zeros(1)),
        {"input_ids": torch.zeros(4, 2)},
        {"size": 7, "images": [torch.zeros(4, 2)]},
        type("Graph", (), {"num_graphs": 4})(),
    ],
)
def test_size_is_told_from_any_inputs(inputs: Any) -> None:
    assert Batch(inputs).size == batch_size_of(inputs) == 4


def test_labels_and_index_know_the_size_better_than_inputs() -> None:
    assert Batch(torch.zeros(12, 2), labels=torch.zeros(3)).size == 3  # a graph's nodes, say
    assert Batch(torch.zeros(12, 2), index=torch.arange(4)).size == 4


def test_size_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(DataError, match=r"batch\.inputs: .*found str"):
        batch_size_of("pictures")


def test_replace_leaves_the_original() -> None:
    batch = Batch(torch.zeros(2, 3), labels=torch.tensor([0, 1]))
    changed = batch.replace(labels=torch.tensor([1, 1]))
    assert batch.require("labels").tolist() == [0, 1]
    assert changed.require("labels").tolist() == [1, 1]
    assert changed.inputs is batch.inputs


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = Batch(
        {"a": torch.zeros(2)},
        labels=torch.zeros(2),
        teacher_inputs=(torch.zeros(2), "text"),
        progress=torch.tensor(0.5),
        totals={"samples": torch.tensor(2)},
        extras={"name": "x", "weights": [torch.zeros(1)]},
    ).to("meta")
    moved = [batch.inputs["a"], batch.labels, batch.teacher_inputs[0], batch.progress, batch.totals["samples"]]
    assert all(t.device.type == "meta" for t in [*moved, batch.extras["weights"][0]])
    assert (batch.mask, batch.teacher_inputs[1], batch.extras["name"]) == (None, "text", "x")


def test_map_tensors_keeps_the_kinds_of_containers() -> None:
    one = torch.ones(1)
    mapped = map_tensors({"p": Pair(one, one), "l": [one, 3], "o": OrderedDict(t=(one, None))}, lambda t: t + 1)
    assert isinstance(mapped["p"], Pair)
    assert isinstance(mapped["o"], OrderedDict)
    assert mapped["p"].right.item() == mapped["l"][0].item() == mapped["o"]["t"][0].item() == 2
    assert (mapped["l"][1], mapped["o"]["t"][1]) == (3, None)
