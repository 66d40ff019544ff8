from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.data.language import ByteTokens, LanguageSplit, language_source
from limbeck.objectives.parts.privacy import blurred, laplace, memorisation_scores, span_scores, token_scores
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.swing_distill import SwingDistill, swing_distill_loss
from tests.objectives.reference import kl, softmax


def logits(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape).double()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_where_nothing_is_private_it_is_kd(temperature: float) -> None:
    student, teacher, mask = logits(3, 4, 7), logits(3, 4, 7), torch.rand(3, 4) < 0.6
    wanted = kd_loss(student, teacher, temperature=temperature, mask=mask)
    found = swing_distill_loss(student, teacher, privacy=torch.zeros(3, 4), temperature=temperature, mask=mask)
    assert torch.equal(found, wanted)
    options = {"hottest": temperature, "epsilon": None, "temperature": temperature, "mask": mask}
    assert torch.equal(swing_distill_loss(student, teacher, privacy=torch.ones(3, 4), **options), wanted)


@pytest.mark.parametrize("mode", ["up", "down"])
def test_equals_the_formula(mode: str) -> None:
    student, teacher, rho = logits(6, 5), logits(6, 5), torch.rand(6).double()
    wanted = []
    for s, t, r in zip(student.tolist(), teacher.tolist(), rho.tolist(), strict=True):
        heat = 2 + (10 - 2) * r
        heat = heat if mode == "up" else 4 / heat
        wanted.append(4 * kl(softmax(t, heat), softmax(s, heat)))
    options = {"temperature": 2.0, "epsilon": None, "mode": mode, "reduction": "none"}
    found = swing_distill_loss(student, teacher, privacy=rho, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(wanted).double())


def test_the_hottest_place_says_nothing() -> None:
    student, teacher = logits(4, 9), logits(4, 9)
    found = swing_distill_loss(student, teacher, privacy=torch.ones(4), hottest=1e7, epsilon=None)
    assert found.item() == pytest.approx(0, abs=1e-12)


def test_noise_makes_another_prediction_the_same_every_time() -> None:
    p, index = logits(5, 4, 9).softmax(-1), torch.tensor([3, 8, 1, 0, 2])
    scale = torch.full((5, 4, 1), 0.3).double()
    found = blurred(p, scale, index, seed=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 4).double())
    assert bool((found >= 0).all())
    assert not torch.allclose(found, p)
    assert torch.equal(found, blurred(p, scale, index, seed=0))
    assert not torch.equal(found, blurred(p, scale, index, seed=1))
    order = torch.tensor([4, 2, 0, 1, 3])  # in whatever batch and row a sample stands
    assert torch.equal(blurred(p[order], scale, index[order], seed=0), found[order])
    assert torch.equal(blurred(p[:2], scale[:2], index[:2], seed=0), found[:2])
    assert torch.equal(blurred(p, 0 * scale, index, seed=0), p / p.sum(-1, keepdim=True))


def test_noise_is_laplaces() -> None:
    draws = laplace(torch.Size([40, 50, 30]), None, 0, torch.device("cpu")).double()
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.abs().mean().item() == pytest.approx(1, abs=0.02)
    assert draws.square().mean().item() == pytest.approx(2, abs=0.06)
    for bound in (0.5, 2.0):
        assert (draws.abs() > bound).double().mean().item() == pytest.approx(math.exp(-bound), abs=0.01)
    rows = draws.reshape(-1, 30)
    assert len(rows.unique(dim=0)) == 2000
    assert abs(float(torch.corrcoef(rows.T)[0, 1])) < 0.1


def test_less_budget_is_more_noise() -> None:
    p = logits(50, 6).softmax(-1)
    far = [float((blurred(p, torch.full((50, 1), 1 / e).double(), None, 0) - p).abs().mean()) for e in (100, 10, 1)]
    assert far[0] < far[1] < far[2]


def test_patterns_find_places() -> None:
    source = language_source(["call 4711 now", "no number here"] * 3, tokenizer="bytes", validation=0)
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(2))
    loss = SwingDistill(pattern=r"[0-9]")
    said = Trace(torch.randn(*batch.require("labels").shape, 258))
    loss.setup(said, said, batch, DataInfo(tokenizers=(ByteTokens(), ByteTokens())))
    scores = loss.table[batch.require("labels").clamp(min=0)]
    rows = zip(batch.require("labels"), scores, strict=True)
    private = ["".join(ByteTokens().decode([i]) for i in row[score > 0]) for row, score in rows]
    assert private == ["4711", ""]
    hidden = batch.require("mask") & (scores == 0)
    other = Trace(torch.randn_like(said.logits))
    assert loss(said, other, batch) != kd_loss(said.logits, other.logits, temperature=1.0, mask=batch.mask)
    public = batch.replace(mask=hidden)
    torch.testing.assert_close(
        loss(said, other, public), kd_loss(said.logits, other.logits, temperature=1.0, mask=hidden)
    )


def test_spans_and_what_was_memorised() -> None:
    offsets = torch.tensor([[[0, 4], [4, 7], [7, 9], [9, 9]], [[0, 2], [2, 4], [4, 6], [0, 0]]])
    assert span_scores(["Ann has 17", "no one"], offsets, [r"Ann", r"\d+"]).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert token_scores((ByteTokens(), ByteTokens()), "[a-c]").sum() == 3
    teacher, reference, labels = logits(3, 4, 5), logits(3, 4, 5), torch.randint(0, 5, (3, 4))
    labels[0, 0] = -1
    found = memorisation_scores(teacher, reference, labels, scale=2.0)
    for b in range(3):
        for i in range(4):
            label = int(labels[b, i])
            pair = (math.log(softmax(z[b, i].tolist())[label]) for z in (teacher, reference))
            p, q = pair
            wanted = 0.0 if label < 0 else min(max((p - q) / 2, 0), 1)
            assert found[b, i].item() == pytest.approx(wanted)
    two = Trace(None, {"logits": teacher}, members=(Trace(teacher), Trace(reference)))
    student = Trace(logits(3, 4, 5))
    loss = SwingDistill()(student, two, Batch(teacher, labels=labels))
    rho = memorisation_scores(teacher, reference, labels)
    torch.testing.assert_close(loss, swing_distill_loss(student.logits, teacher, privacy=rho))


def test_what_it_refuses() -> None:
    student = torch.randn(2, 3, 4)
    with pytest.raises(TensorError, match="privacy"):
        swing_distill_loss(student, student, privacy=torch.zeros(2, 4))
    with pytest.raises(DataError, match="pattern, or scores"):
        SwingDistill()(Trace(student), Trace(student), Batch(student))
    with pytest.raises(ConfigError, match="regular expression"):
        SwingDistill(pattern="[")
    with pytest.raises(ConfigError, match="tokenizer"):
        SwingDistill(pattern="a").setup(Trace(student), Trace(student), Batch(student), DataInfo())
    with pytest.raises(ConfigError, match="epsilon"):
        SwingDistill(epsilon=0.0)
    with pytest.raises(ConfigError, match="mode"):
        SwingDistill(mode="left")  # type: ignore[arg-type]
