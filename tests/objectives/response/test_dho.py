"""DHO: the paper's sum by loops, and two heads that do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TapError, TensorError
from limbeck.models import put_head, settle_head
from limbeck.models.heads import DualHead, dual_log_probabilities
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.dho import DHO, dho_loss
from limbeck.objectives.response.kd import KD
from tests.objectives.reference import kd


def pair(labels: list[int]) -> tuple[nn.Module, nn.Module, Batch]:
    student, teacher = (nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)) for width in (5, 9))
    batch = Batch(torch.randn(len(labels), 4, dtype=torch.float64), torch.tensor(labels))
    put_head(student.double(), "dual", example=batch)
    return student, teacher.double(), batch


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_it_is_the_papers_equation(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    assert dho_loss(student, teacher, temperature=temperature).item() == pytest.approx(
        kd(student, teacher, temperature), rel=1e-10
    )


def test_it_is_zero_where_the_logits_differ_by_a_constant() -> None:
    teacher = torch.randn(5, 4, dtype=torch.float64)
    assert dho_loss(teacher + 3.0, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_each_loss_reaches_its_own_head() -> None:
    student, teacher, batch = pair([0, 1, 2, -1, -1])
    for loss, own, other in ((CrossEntropy(), "2.ce", "2.kd"), (DHO(), "2.kd", "2.ce")):
        student.zero_grad(set_to_none=True)
        distiller = Distiller(student.train(), loss, teacher if loss.teacher_taps else None).setup(batch)
        distiller(batch).total.backward()
        distiller.close()
        assert student.get_parameter(f"{own}.weight").grad.any()
        assert student.get_parameter(f"{other}.weight").grad is None
        assert student[0].weight.grad.any()  # they meet in the backbone


def test_samples_without_a_label_teach_the_other_head_only() -> None:
    student, teacher, batch = pair([0, 1, 2, -1, -1])
    distiller = Distiller(student.train(), CrossEntropy() + DHO(), teacher).setup(batch)
    losses = distiller(batch)
    first = student[:2](batch.inputs)
    ce, kd_ = student[2].ce(first), student[2].kd(first)
    wanted = nn.functional.cross_entropy(ce[:3], batch.labels[:3])
    assert losses.terms["cross_entropy"].item() == pytest.approx(wanted.item())
    assert losses.terms["dho"].item() == pytest.approx(kd(kd_.detach(), teacher(batch.inputs).detach(), 2.0))


def test_tied_heads_are_one_head_with_both_losses() -> None:
    student, teacher, batch = pair([0, 1, 2, 1])
    student[2].kd.load_state_dict(student[2].ce.state_dict())
    plain = nn.Sequential(student[0], nn.ReLU(), nn.Linear(5, 3).double())
    plain[2].load_state_dict(student[2].ce.state_dict())
    gradients = []
    for model, loss in ((student, 0.5 * CrossEntropy() + 0.5 * DHO()), (plain, 0.5 * CrossEntropy() + 0.5 * KD(2.0))):
        model.zero_grad(set_to_none=True)
        losses = Distiller(model.train(), loss, teacher).setup(batch)(batch)
        losses.total.backward()
        gradients.append((losses.total.item(), student[0].weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    together = student[2].ce.weight.grad + student[2].kd.weight.grad
    torch.testing.assert_close(together, plain[2].weight.grad)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_prediction(alpha: float) -> None:
    ce, kd_ = torch.randn(2, 6, 4, dtype=torch.float64)
    found = dual_log_probabilities(ce, kd_, alpha, 1.5).exp()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(found, alpha * ce.softmax(1) + (1 - alpha) * (kd_ / 1.5).softmax(1))


def test_in_training_the_output_is_the_labels_head() -> None:
    head, x = DualHead(4, 3, alpha=1.0), torch.randn(5, 4)
    assert torch.equal(head(x), head.ce(x))
    torch.testing.assert_close(head.eval()(x), head.ce(x).log_softmax(dim=1))


def test_alpha_and_beta_are_chosen_on_held_out_data_and_ship() -> None:
    student, _, batch = pair([0, 1, 2, 0, 1, 2, 0, 1])
    with torch.no_grad():
        labels = student[2].ce(student[:2](batch.inputs)).argmax(dim=1)
    chosen = settle_head(student, [batch.replace(labels=labels)])
    accuracy = (student.eval()(batch.inputs).argmax(dim=1) == labels).double().mean()
    assert accuracy == 1.0
    assert chosen == pytest.approx({"alpha": float(student[2].alpha), "beta": float(student[2].beta)})
    assert student.state_dict().keys() >= {"2.alpha", "2.beta"}
    assert settle_head(nn.Sequential(nn.Linear(2, 2)), []) == {}


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        DHO(temperature=0.0)
    with pytest.raises(TensorError, match="teacher_logits"):
        dho_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    student, teacher, batch = pair([0, 1])
    student[2] = nn.Linear(5, 3).double()
    with pytest.raises(TapError, match=r"head\.kd: .*put_head"):
        Distiller(student, DHO(), teacher).setup(batch)
