"""OFD against its paper's equations: the partial distance, the margins, the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TapError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.taps import listen
from limbeck.models import create
from limbeck.objectives.feature.ofd import OFD, ofd_loss, ofd_margin


def test_the_papers_sum() -> None:
    student, teacher, margin = torch.randn(3, 4, 2, 2).double(), torch.randn(3, 4, 2, 2).double(), -torch.rand(4)
    wanted = 0.0
    for b in range(3):
        for c in range(4):
            for s, t in zip(student[b, c].flatten().tolist(), teacher[b, c].flatten().tolist(), strict=True):
                t = max(t, margin[c].item())
                wanted += 0.0 if s <= t <= 0 else (s - t) ** 2
    assert ofd_loss(student, teacher, margin).item() == pytest.approx(wanted / 3, rel=1e-12)


def test_below_a_silent_neuron_nothing_is_asked() -> None:
    student = torch.tensor([[-5.0, -5.0, -0.2, 0.5]], requires_grad=True)
    loss = ofd_loss(student, torch.tensor([[-1.0, 1.0, -3.0, -3.0]]), torch.full((4,), -0.5))
    loss.backward()
    assert student.grad[0].tolist() == pytest.approx([0.0, -12.0, 0.6, 2.0])


def test_margin_is_the_mean_of_negative_responses() -> None:
    """Against a sum over a fine grid of the Gaussian."""
    weight, bias = torch.tensor([1.0, 0.5, 2.0, -1.0]).double(), torch.tensor([0.0, 0.3, -1.0, 0.5]).double()
    grid = (torch.arange(300000, dtype=torch.float64) + 0.5) * -1e-4
    for found, std, mean in zip(ofd_margin(weight, bias), weight.abs(), bias, strict=True):
        density = torch.exp(-0.5 * ((grid - mean) / std) ** 2)
        assert found.item() == pytest.approx(((grid * density).sum() / density.sum()).item(), rel=1e-4)


def test_margin_of_channels_that_hardly_ever_are_negative_or_do_not_vary() -> None:
    weight, bias = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4.0, -2.0, 2.0])
    assert ofd_margin(weight, bias).tolist() == [-3.0, -2.0, 0.0]


class Net(nn.Module):
    """Two stages, each ends with batch normalisation and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.norm1, self.relu1 = nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.layer2, self.norm2, self.relu2 = nn.Conv2d(width, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.layer1(x)))
        return self.head(self.relu2(self.norm2(self.layer2(x))).mean(dim=(2, 3)))


def trained(width: int, images: Tensor) -> Net:
    """Its normalisations know the images and have weights of their own."""
    net = Net(width)
    for norm in (net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        norm.momentum = None
    net.train()(images)
    return net.eval()


def test_margins_measured_and_in_closed_form() -> None:
    """On many Gaussian pixels the closed form is near the mean itself, which is exact on any data."""
    images = torch.randn(200, 1, 8, 8)
    teacher = trained(5, images)
    batch, data = Batch(images[:4]), DataInfo(batches=lambda: (Batch(part) for part in images.split(50)))
    measured, closed, example = OFD(), OFD(norms=["norm1", "norm2"]), OFD()
    Distiller(Net(4), measured, teacher).setup(batch, data)
    Distiller(Net(4), closed, teacher).setup(batch, data)
    Distiller(Net(4), example, teacher).setup(batch)
    for i, name in enumerate(("norm1", "norm2")):
        for objective, seen, near in ((measured, images, 1e-4), (example, images[:4], 1e-4), (closed, images, 0.2)):
            response = listen(teacher, seen, [name])[name]
            for c, margin in enumerate(getattr(objective, f"margin_{i}").tolist()):
                negative = response[:, c][response[:, c] < 0]
                assert margin == pytest.approx(negative.mean().item(), rel=near, abs=near)


def test_layers_and_connectors() -> None:
    teacher, student = create("resnet14", in_channels=1), create("resnet8", in_channels=1).eval()
    batch = Batch(torch.randn(4, 1, 8, 8), labels=torch.arange(4))
    loss = OFD()
    found = Distiller(student, loss, teacher).setup(batch)(batch).total
    s_trace, t_trace = (listen(m, batch.inputs, ["preactivations"])["preactivations"] for m in (student, teacher))
    wanted = torch.zeros(())
    for i, (s, t) in enumerate(zip(s_trace, t_trace, strict=True)):
        conv, norm = loss.connectors[i]
        wanted = wanted + ofd_loss(norm(conv(s)), t, getattr(loss, f"margin_{i}")) / 2 ** (2 - i)
    torch.testing.assert_close(found, wanted)
    assert {n for n, _ in loss.named_buffers()} == {"margin_0", "margin_1", "margin_2"}


def test_mistakes_are_named() -> None:
    feature, images = torch.randn(2, 4, 3, 3), torch.randn(4, 1, 8, 8)
    with pytest.raises(TensorError, match=r"margin: one margin a channel; found \[3\]; wanted \[4\]"):
        ofd_loss(feature, feature, torch.zeros(3))
    with pytest.raises(TensorError, match="student_feature"):
        ofd_loss(feature[:, :3], feature, torch.zeros(4))
    teacher = trained(5, images)
    for names, error, message in (
        (["norm1"], ConfigError, r"norms: one batch normalisation a layer; found \[\[5\]\]; wanted \[\[5\], \[6\]\]"),
        (["norm1", "relu2"], TapError, "relu2: this module has no weight; found ReLU"),
        (["norm1", "norm3"], TapError, "norm3"),
    ):
        with pytest.raises(error, match=message):
            Distiller(Net(4), OFD(norms=names), teacher).setup(Batch(images))
