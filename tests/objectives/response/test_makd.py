from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.makd import MaKD, makd_loss, read_answers
from tests.objectives import reference


def test_equals_the_paper_and_its_minimum_is_the_entropy() -> None:
    logits, answers = torch.randn(4, 3).double().requires_grad_(), torch.rand(4, 3).double()
    wanted = []
    for z, a in zip(logits.flatten().tolist(), answers.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        wanted.append(-a * math.log(p) - (1 - a) * math.log(1 - p))
    value = makd_loss(logits, answers)
    assert value.item() == pytest.approx(reference.mean(wanted), rel=1e-9)
    value.backward()
    torch.testing.assert_close(logits.grad, ((logits.sigmoid() - answers) / 12).detach())
    entropy = -(answers * answers.log() + (1 - answers) * (1 - answers).log()).mean()
    torch.testing.assert_close(makd_loss(answers.logit(), answers), entropy)
    assert makd_loss(torch.zeros(1, 1), torch.full((1, 1), 0.5)).item() == pytest.approx(math.log(2))


def test_unknown_answers_add_nothing() -> None:
    logits = torch.randn(2, 3).requires_grad_()
    answers = torch.tensor([[0.3, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    makd_loss(logits, answers).backward()
    assert (logits.grad[answers < 0] == 0).all()
    assert (logits.grad[answers >= 0] != 0).all()


def make(aspects: MaKD, weight: float = 4.0, classes: int = 3) -> tuple[nn.Module, Distiller, Batch]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))
    extras = {"aspects": torch.rand(5, 4)}
    batch = Batch(
        torch.randn(5, 6), labels=torch.arange(5) % classes, index=torch.tensor([3, 0, 4, 1, 2]), extras=extras
    )
    return student, Distiller(student, CrossEntropy() + weight * aspects).setup(batch), batch


def test_it_is_a_classifier_with_more_outputs() -> None:
    """The paper's form: one layer with C + Q outputs, cross-entropy on the first, answers on the rest."""
    aspects = MaKD()
    student, distiller, batch = make(aspects)
    head = aspects.aspects
    wide = nn.Linear(8, 7)
    wide.weight.data = torch.cat([student[2].weight.data, head.weight.data])
    wide.bias.data = torch.cat([student[2].bias.data, head.bias.data])
    z = wide(student[:2](batch.inputs))
    answers = nn.functional.binary_cross_entropy_with_logits(z[:, 3:], batch.extras["aspects"])
    wanted = nn.functional.cross_entropy(z[:, :3], batch.labels) + 4.0 * answers
    torch.testing.assert_close(distiller(batch).total, wanted)


def test_weight_zero_is_plain_training() -> None:
    aspects = MaKD()
    student, distiller, batch = make(aspects, weight=0.0)
    distiller(batch).total.backward()
    found = [p.grad.clone() for p in student.parameters()]
    assert all((p.grad == 0).all() for p in aspects.parameters())
    student.zero_grad()
    nn.functional.cross_entropy(student(batch.inputs), batch.labels).backward()
    for grad, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("kind", ["npy", "json", "ids"])
def test_answers_from_a_file(tmp_path: Path, kind: str) -> None:
    table = torch.rand(5, 4)
    path = tmp_path / ("a.npy" if kind == "npy" else "a.json")
    if kind == "npy":
        np.save(path, table.numpy())
    else:
        rows = table.tolist()
        path.write_text(json.dumps(rows if kind == "json" else {str(i): rows[i] for i in (4, 0, 2, 1, 3)}))
    aspects = MaKD(answers=str(path))
    _, distiller, batch = make(aspects)
    found = distiller(batch.replace(extras={})).terms["makd"]
    plain = MaKD()
    _, other, batch = make(plain)
    plain.load_state_dict(aspects.state_dict())
    torch.testing.assert_close(found, other(batch.replace(extras={"aspects": table[batch.index]})).terms["makd"])


def test_a_sample_the_table_leaves_out_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"2": [0.5, 1.0], "0": [0.0, 0.25]}))
    assert read_answers(str(path)).tolist() == [[0.0, 0.25], [-1.0, -1.0], [0.5, 1.0]]


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="answers.*nowhere"):
        MaKD(answers=str(tmp_path / "nowhere.npy"))
    path = tmp_path / "bad.json"
    for text in ("{}", "3", '{"a": [1]}', "[[1], [1, 2]]", "[1, 2]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="answers"):
            MaKD(answers=str(path))
    _, distiller, batch = make(MaKD())
    with pytest.raises(DataError, match="aspects"):
        distiller(batch.replace(extras={}))
    with pytest.raises(TensorError, match="answers"):
        makd_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_informative_answers_help_where_labels_are_few() -> None:
    """A look-up table stands for the large model: its answers tell the class up to a code."""
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        code, centres, labels = torch.randint(0, 2, (6, 10)).float(), torch.randn(6, 40), torch.arange(600) % 6
        inputs = centres[labels] + 2 * torch.randn(600, 40)
        few = torch.where(torch.arange(300) < 12, labels[:300], -100)
        batch, scores = Batch(inputs[:300], labels=few, extras={"aspects": code[labels[:300]]}), []
        for weight in (0.0, 4.0):
            torch.manual_seed(1)
            student = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 6))
            distiller = Distiller(student, CrossEntropy() + weight * MaKD()).setup(batch)
            optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
            for _ in range(60):
                optimizer.zero_grad()
                distiller(batch).total.backward()
                optimizer.step()
            scores.append((student(inputs[300:]).argmax(1) == labels[300:]).float().mean().item())
        gains.append(scores[1] - scores[0])
    assert reference.mean(gains) > 0.04
