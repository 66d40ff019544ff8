"""The policy gradient against the gradient of the divergence itself, summed over every text there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.trace import Trace
from limbeck.objectives.parts.policy import DRAWN, SAID, WRITTEN, Policy, policy_rows

V, MOST, END = 3, 3, 0
PREFIXES = [p for n in range(MOST) for p in itertools.product(range(V), repeat=n) if END not in p]
PLACE = {prefix: number for number, prefix in enumerate(PREFIXES)}
TEXTS = [
    said
    for n in range(1, MOST + 1)
    for said in itertools.product(range(V), repeat=n)
    if END not in said[:-1] and (said[-1] == END or n == MOST)
]


def tables() -> tuple[Tensor, Tensor]:
    """The logits of both models after every prefix, which are all they have for weights."""
    drawn = torch.Generator().manual_seed(3)
    own, other = (2 * torch.randn(len(PREFIXES), V, generator=drawn, dtype=torch.double) for _ in range(2))
    return own.requires_grad_(), other


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """All texts as a batch: which prefix each place has, its token, and whether there is one."""
    place, labels = torch.zeros(2, len(TEXTS), MOST, dtype=torch.long)
    mask = torch.zeros(len(TEXTS), MOST, dtype=torch.bool)
    for row, said in enumerate(TEXTS):
        for t, token in enumerate(said):
            place[row, t], labels[row, t], mask[row, t] = PLACE[said[:t]], token, True
    return place, labels, mask


def log_chances(table: Tensor, place: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    found = table.log_softmax(-1)[place].gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(~mask, 0.0)


def divergence_gradient() -> Tensor:
    """Of KL(q || p) of whole texts, from its definition."""
    own, other = tables()
    total: Tensor | float = 0.0
    for said in TEXTS:
        chance, rival = own.new_ones(()), own.new_ones(())
        for t, token in enumerate(said):
            chance = chance * own[PLACE[said[:t]]].softmax(-1)[token]
            rival = rival * other[PLACE[said[:t]]].softmax(-1)[token]
        total = total + chance * (chance / rival).log()
    assert isinstance(total, Tensor)
    total.backward()
    assert own.grad is not None
    return own.grad


def expected_gradient(share: float, **options: bool) -> Tensor:
    """The mean of the estimator's gradient over texts drawn from the mixture of both models."""
    own, other = tables()
    place, labels, mask = rows()
    q, p = (log_chances(table.detach(), place, labels, mask).exp() for table in (own, other))
    drawn = ((1 - share) * q + share * p).log()
    chances = drawn.masked_fill(~mask, 0.0).sum(1).exp()
    assert math.isclose(float(chances.sum()), 1.0)
    values = policy_rows(own[place], other[place], labels, mask, drawn, **options)
    (chances.unsqueeze(1) * values).sum().backward()
    assert own.grad is not None
    return own.grad


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_on_average_it_is_the_gradient_of_the_divergence(share: float, single_step: bool) -> None:
    found = expected_gradient(share, single_step=single_step, length_norm=False, whole=True)
    torch.testing.assert_close(found, divergence_gradient(), atol=1e-12, rtol=1e-10)


def test_the_papers_weights_are_exact_for_the_students_own_texts_alone() -> None:
    exact = divergence_gradient()
    torch.testing.assert_close(expected_gradient(0.0, length_norm=False), exact, atol=1e-12, rtol=1e-10)
    near = expected_gradient(0.4, length_norm=False)
    assert (near - exact).abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.9


def test_length_normalisation_takes_the_mean_of_what_follows() -> None:
    """Place by place, from the paper's equation in plain loops."""
    own, other = tables()
    place, labels, mask = rows()
    q, p = (log_chances(table.detach(), place, labels, mask) for table in (own, other))
    for single_step in (True, False):
        own.grad = None
        policy_rows(own[place], other[place], labels, mask, single_step=single_step).sum().backward()
        wanted, log_own = torch.zeros_like(own), own.detach().log_softmax(-1)
        chance, log_other = log_own.exp(), other.log_softmax(-1)
        for row, said in enumerate(TEXTS):
            for t, token in enumerate(said):
                at = PLACE[said[:t]]
                first = t + 1 if single_step else t
                rest = [float(p[row, s] - q[row, s]) for s in range(first, len(said))]
                gain = sum(rest) / len(rest) if rest else 0.0
                wanted[at] -= gain * (torch.eye(V, dtype=torch.double)[token] - chance[at])
                if single_step:
                    gap = log_own[at] - log_other[at]
                    wanted[at] += chance[at] * (gap - (chance[at] * gap).sum())
        assert own.grad is not None
        torch.testing.assert_close(own.grad, wanted)


def test_clipping_stops_what_has_gone_far_enough() -> None:
    """As in proximal policy optimisation: by cases, for a ratio above, inside and below, and both signs of R."""
    other = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]], dtype=torch.double)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for token, sign in ((0, 1), (1, -1)):  # of the second place: R of the first is above or below 0
        labels = torch.tensor([[0, token]])
        for ratio, stays in ((1.5, sign < 0), (1.1, True), (0.5, sign > 0)):
            own = torch.zeros(1, 2, 2, dtype=torch.double, requires_grad=True)
            drawn = torch.full((1, 2), math.log(0.5 / ratio), dtype=torch.double)
            values = policy_rows(own, other, labels, mask, drawn, clip=0.2, length_norm=False)
            (found,) = torch.autograd.grad(values[0, 0], own)
            reward = float((other.log_softmax(-1)[0, 1, token]) - math.log(0.5))
            assert reward * sign > 0
            wanted = torch.tensor([-0.5, 0.5], dtype=torch.double) * reward * ratio * stays
            torch.testing.assert_close(found[0, 0], wanted)


def test_hidden_places_and_padded_vocabularies_change_nothing() -> None:
    own, other = tables()
    place, labels, mask = rows()
    q = log_chances(own.detach(), place, labels, mask)
    values = policy_rows(own[place], other[place], labels, mask, q)
    (wanted,) = torch.autograd.grad(values.sum(), own)
    wide = torch.nn.functional.pad(other[place], (0, 2), value=5.0)
    more = torch.nn.functional.pad(own[place], (0, 0, 0, 1), value=2.0), torch.nn.functional.pad(wide, (0, 0, 0, 1))
    labels, mask, q = (torch.nn.functional.pad(t, (0, 1)) for t in (labels, mask, q))
    values = policy_rows(*more, labels, mask, q)
    (found,) = torch.autograd.grad(values.sum(), own)
    torch.testing.assert_close(found, wanted)
    assert not values[~mask].any()


def test_as_an_objective_it_reads_what_a_scheme_wrote() -> None:
    own, other = tables()
    place, labels, mask = rows()
    q = log_chances(own.detach(), place, labels, mask)
    student, teacher = (Trace(None, {"logits": table[place]}) for table in (own, other))
    extras = {WRITTEN: mask, SAID: labels, DRAWN: q}
    batch = Batch(None, torch.full_like(labels, -1), mask=torch.zeros_like(mask), extras=extras)
    found = Policy(clip=None)(student, teacher, batch)
    wanted = policy_rows(own[place], other[place], labels, mask, q).sum() / mask.sum()
    torch.testing.assert_close(found, wanted)
    assert int(batch.count(Policy.contract.normalizer)) == int(mask.sum())
    read = Policy(clip=None)(student, teacher, Batch(None, labels, mask=mask))
    torch.testing.assert_close(read, policy_rows(own[place], other[place], labels, mask).sum() / mask.sum())
    assert float(Policy()(student, student, batch).detach()) == pytest.approx(0.0, abs=1e-12)
