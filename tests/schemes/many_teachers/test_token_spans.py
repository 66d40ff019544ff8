"""Tokens of two tokenizers over the same text, against plain loops."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from limbeck.schemes.many_teachers.token_spans import apart, piece_means, pieces, same_spans, shared_kl


def cut(length: int, draw: torch.Generator, width: int) -> torch.Tensor:
    """Spans of a random cut of a text, with a mark in front and padding behind."""
    ends = (torch.rand(length - 1, generator=draw) < 0.5).nonzero().flatten() + 1
    edges = [0, *ends.tolist(), length]
    spans = [(0, 0), *itertools.pairwise(edges)]
    return torch.tensor([*spans, *[(0, 0)] * (width - len(spans))])


def problem() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    spans = torch.stack([cut(12, draw, 16) for _ in range(20)])
    other = torch.stack([cut(12, draw, 18) for _ in range(20)])
    return spans, other, spans[..., 1] > 0, other[..., 1] > 0


def test_same_characters_are_found() -> None:
    spans, other, counts, theirs = problem()
    found, some = same_spans(spans, other, counts, theirs), 0
    for row in range(20):
        known = {tuple(s): j for j, s in enumerate(other[row].tolist()) if s[1] > s[0]}
        for place, span in enumerate(spans[row].tolist()):
            wanted = known.get(tuple(span), -1) if span[1] > span[0] else -1
            assert int(found[row, place]) == wanted
            some += wanted >= 0
    assert some > 20


def test_pieces_are_the_least_that_both_cut_off() -> None:
    spans, other, counts, theirs = problem()
    first, second = pieces(spans, other, counts, theirs)
    for row in range(20):
        ends = [{s[1] for s in x[row].tolist() if s[1] > s[0]} for x in (spans, other)]
        common = sorted(ends[0] & ends[1])
        for x, found in ((spans, first), (other, second)):
            for span, number in zip(x[row].tolist(), found[row].tolist(), strict=True):
                if span[1] == span[0]:
                    assert number == -1
                else:
                    assert number == sum(end < span[1] for end in common)


def test_what_is_behind_the_last_common_end_is_of_no_piece() -> None:
    spans, other = torch.tensor([[[0, 2], [2, 4]]]), torch.tensor([[[0, 2], [2, 5]]])
    every = torch.ones(1, 2) > 0
    assert [x.tolist() for x in pieces(spans, other, every, every)] == [[[0, -1]], [[0, -1]]]


def test_means_of_pieces() -> None:
    states, piece = torch.randn(3, 6, 4), torch.randint(-1, 3, (3, 6))
    means, known = piece_means(states, piece, 5)
    for row in range(3):
        for number in range(5):
            own = piece[row] == number
            assert bool(known[row, number]) == bool(own.any())
            if own.any():
                torch.testing.assert_close(means[row, number], states[row, own].mean(0))


def test_divergence_over_shared_tokens_is_that_of_renormalised_predictions() -> None:
    z, t = torch.randn(5, 7).double(), torch.randn(5, 9).double()
    own, other = torch.tensor([0, 3, 6]), torch.tensor([8, 1, 2])
    p, q = (t / 2).softmax(-1)[:, other], (z / 2).softmax(-1)[:, own]
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    torch.testing.assert_close(shared_kl(z, t, own, other, 2.0), 4 * (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(apart(z, 3 * z), torch.zeros(5).double())
    torch.testing.assert_close(apart(z, z.flip(0)), 1 - F.cosine_similarity(z, z.flip(0)))
