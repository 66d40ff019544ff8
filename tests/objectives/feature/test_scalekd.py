"""ScaleKD against the paper's equations, its projectors, and the teacher's part that it runs again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError, TensorError
from limbeck.objectives.feature.scalekd import ScaleKD, scalekd_loss
from limbeck.objectives.response.kd import kd_loss


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor, direct: float, alternative: float) -> float:
    """Both views with plain loops, the second by way of a discrete cosine transform."""

    def view(feature: np.ndarray) -> np.ndarray:
        spectrum = dctn(feature, type=2, axes=(1, 2))
        assert np.abs(idctn(spectrum, type=2, axes=(1, 2)) - feature).max() < 1e-12
        spectrum[:, 0, 0] = 0
        return idctn(spectrum, type=2, axes=(1, 2))

    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        for weight, a, b in ((direct, s, t), (alternative, view(s), view(t))):
            for y in range(s.shape[1]):
                for x in range(s.shape[2]):
                    p, q = a[:, y, x], b[:, y, x]
                    total += weight * ((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2).sum()
    return total / len(student)


@pytest.mark.parametrize(("direct", "alternative"), [(0.08, 0.06), (1.0, 0.0), (0.0, 1.0)])
def test_it_is_the_papers_equation(direct: float, alternative: float) -> None:
    student, teacher = maps(3, 4, 5, 6), maps(3, 4, 5, 6, seed=1)
    found = scalekd_loss(student, teacher, direct=direct, alternative=alternative)
    assert found.item() == pytest.approx(reference(student, teacher, direct, alternative), rel=1e-12)


def test_what_does_not_matter() -> None:
    student, teacher = maps(2, 4, 3, 3), maps(2, 4, 3, 3, seed=1)
    assert scalekd_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-15)
    scale = maps(2, 1, 3, 3, seed=2).exp()
    wanted = scalekd_loss(student, teacher, alternative=0.0)
    torch.testing.assert_close(scalekd_loss(scale * student, teacher, alternative=0.0), wanted)
    torch.testing.assert_close(scalekd_loss(student, scale * teacher, alternative=0.0), wanted)
    shift = 3 * maps(1, 4, 1, 1, seed=3)  # the same in all places: the frequency view does not see it
    wanted = scalekd_loss(student, teacher, direct=0.0)
    torch.testing.assert_close(scalekd_loss(student + shift, teacher + shift, direct=0.0), wanted)
    assert scalekd_loss(shift.expand(2, -1, 3, 3), teacher, direct=0.0, alternative=1.0).item() == pytest.approx(9)


def test_reductions_and_mask() -> None:
    student, teacher = maps(3, 4, 2, 2), maps(3, 4, 2, 2, seed=1)
    each = scalekd_loss(student, teacher, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(scalekd_loss(student, teacher, reduction="sum"), each.sum())
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(scalekd_loss(student, teacher, mask=mask), each[mask].mean())


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Three resolutions; the last stage is ``layers.2``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [(3, width, 1), (width, width, 2), (width, 2 * width, 2)]
        self.layers = nn.ModuleList(nn.Sequential(Block(*s), Block(s[1], s[1])) for s in sizes)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class TokenBlock(nn.Module):
    """Like Swin's: it wants to know height and width, and answers with a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], again: bool = False) -> tuple[Tensor, None]:
        grid = self.norm(x).transpose(1, 2).unflatten(2, input_dimensions)
        return x + self.mix(grid).flatten(2).transpose(1, 2), None


class Tokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(TokenBlock(width) for _ in range(3))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, _ = block(x, size)
        return self.fc(x.mean(1))


def batch(size: int = 4) -> Batch:
    inputs = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(inputs, labels=torch.arange(size) % 5)


@pytest.mark.parametrize("part", ["blocks:-1", "layers.2", "layers.1", None])
def test_gradient_flows_through_the_teachers_part_and_never_into_it(part: str | None) -> None:
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, ScaleKD(part=part, answers=0.0), teacher).setup(batch())
    losses = distiller(batch())
    # Without what compares the later map, the student learns by what the teacher's part makes of the earlier one.
    early = next(iter(distiller.loss))(*distiller.traces(batch()), batch())["early"]
    early.backward()
    assert set(losses.terms) == {"scalekd/early", "scalekd/late"}
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())
    assert bool(student.layers[1][1].conv.weight.grad.any())
    assert student.layers[2][0].conv.weight.grad is None


def test_what_it_computes() -> None:
    """The earlier map through the last stage; what comes out asks the later map; both views against the teacher."""
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6).eval()
    loss = ScaleKD(part="layers.2", direct=0.5, alternative=0.25)
    distiller = Distiller(student.eval(), loss, teacher).setup(batch())
    x = batch().inputs
    s1 = student.layers[1](student.layers[0](x))
    s2, t2 = student.layers[2](s1), teacher.layers[2](teacher.layers[1](teacher.layers[0](x)))
    early = [teacher.layers[2](p(s1)) for p in loss.projectors[:2]]
    late = [p(s2, q) for p, q in zip(loss.projectors[2:], early, strict=True)]
    wanted = {
        "scalekd/early": scalekd_loss(early[0], t2, early[1], direct=0.5, alternative=0.25),
        "scalekd/late": scalekd_loss(late[0], t2, late[1], direct=0.5, alternative=0.25),
        "scalekd/answers": 0.5 * kd_loss(student(x), teacher(x), temperature=1.0),
    }
    torch.testing.assert_close(distiller(batch()).terms, {k: v.detach() for k, v in wanted.items()})
    none = Distiller(student, ScaleKD(direct=0.0, alternative=0.0), teacher).setup(batch())(batch()).total
    torch.testing.assert_close(none, wanted["scalekd/answers"])


def test_a_part_that_wants_height_and_width() -> None:
    student, teacher = Net(4), Tokens(8)
    distiller = Distiller(student, ScaleKD(), teacher).setup(batch())
    distiller(batch()).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert bool(student.layers[1][1].conv.weight.grad.any())


def test_it_learns() -> None:
    torch.manual_seed(0)
    distiller = Distiller(Net(4), ScaleKD(), Net(6)).setup(batch(8))
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        optimizer.zero_grad()
        total = distiller(batch(8)).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < 0.8 * seen[0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 2, 2), nn.Bilinear(4, 4, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2).contiguous()
        return self.fc(self.last(x, x).mean(1))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="does not go on from one tensor"):
        Distiller(Net(4), ScaleKD(part="last"), Two()).setup(batch())
    with pytest.raises(ConfigError, match="one module is wanted"):
        Distiller(Net(4), ScaleKD(part="blocks"), Net(6)).setup(batch())
    with pytest.raises(TensorError, match="differ in shape"):
        scalekd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    distiller = Distiller(Net(4), ScaleKD(), Net(6)).setup(batch())
    with pytest.raises(LimbeckError, match="one size"):
        distiller(Batch(torch.zeros(2, 3, 16, 16)))
