"""MST-Distill against its authors' code: masks, and the losses of its first and last stage, with gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.schemes.many_teachers.masking import MaskNet
from limbeck.schemes.many_teachers.specialists import imbalance, routed_rows

with np.load(Path(__file__).parent / "mst_distill_mst_distill.npz", allow_pickle=False) as loaded:
    NUMBERS = dict(loaded)


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in NUMBERS.items() if k.startswith(prefix)}


#: What their modules are called in ours.
NAMES = {
    "embed": "embed",
    "mha": "attention",
    "fc": "last",
    "spatial_reduce.downsample": "reduce",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in theirs.items():
        (prefix,) = (p for p in NAMES if name.startswith(p + "."))
        found[NAMES[prefix] + name.removeprefix(prefix)] = value
    return found


@pytest.mark.parametrize("case", ["vector", "maps"])
def test_masks(case: str) -> None:
    given = part(f"{case}/")
    net = MaskNet(7, maps=case == "maps").double()
    state = ours(part(f"{case}/state/"))
    # Theirs is the state after the step: only the statistics of normalisation moved, which training does not read.
    net.load_state_dict(state)
    x = given["x"].requires_grad_()
    mask = net(x)
    torch.testing.assert_close(mask, given["mask"])
    (mask * given["w"]).sum().backward()
    torch.testing.assert_close(x.grad, given["grad"])
    for name, wanted in ours(part(f"{case}/grads/")).items():
        torch.testing.assert_close(net.get_parameter(name).grad, wanted)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("mode", ["KL", "CV"])
def test_the_mixture(k: int, mode: str) -> None:
    given, wanted, state = part("mix/"), part(f"mix/{k}{mode}/"), part("mix/state/")
    z = given["z"].requires_grad_()
    router = nn.Sequential(nn.Linear(5, 10), nn.Linear(10, 4)).double()
    router.load_state_dict({{"fc1": "0", "fc2": "1"}[n.split(".")[0]] + n[3:]: v for n, v in state.items()})
    gates = router(z).softmax(-1)
    taught = routed_rows(z, given["experts"], gates, k, 4.0, "top").mean()
    balance = imbalance(gates, mode.lower())  # type: ignore[arg-type]
    torch.testing.assert_close(taught, wanted["kd"])
    torch.testing.assert_close(balance, wanted["lb"])
    loss = nn.functional.cross_entropy(z, given["y"]) + taught + balance
    loss.backward()
    torch.testing.assert_close(loss, wanted["loss"])
    torch.testing.assert_close(z.grad, wanted["grad"])
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in router.parameters()]), wanted["router"])


def test_the_weighted_mixture() -> None:
    given, wanted, state = part("mix/"), part("mix/weighted/"), part("mix/state/")
    z = given["z"].requires_grad_()
    inner = z @ state["fc1.weight"].T + state["fc1.bias"]
    gates = (inner @ state["fc2.weight"].T + state["fc2.bias"]).softmax(-1)
    value = routed_rows(z, given["experts"], gates, 1, 4.0, "mixed").mean()
    value.backward()
    torch.testing.assert_close(value, wanted["kd"])
    torch.testing.assert_close(z.grad, wanted["grad"])


def table(values: Tensor) -> nn.Module:
    """Answers seven unit vectors by the rows of a table; the last through the bias."""
    net = nn.Sequential(nn.Identity(), nn.Linear(7, 6, bias=False), nn.Linear(6, 5)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(6, 7))
        net[2].weight.copy_((values[:6] - values[6]).T)
        net[2].bias.copy_(values[6])
    return net


def test_learning_together() -> None:
    given, batch = part("together/"), Batch(torch.eye(7, dtype=torch.double), part("mix/")["y"])
    student, *teachers = (table(values) for values in given["z"])
    named = {f"t{n}": FrozenTeacher(model) for n, model in enumerate(teachers)}
    cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(steps=9), teachers=named)
    (training,) = build("mst_distill", layers=1, heads=1).trainings(cast)
    found = training.stages[0].distiller.setup(batch).train()
    losses = found(batch)
    torch.testing.assert_close(losses.total, given["loss"])
    losses.total.backward()
    for model, wanted in zip([student, *found.crew.models], given["grad"], strict=True):
        torch.testing.assert_close(model[2].weight.grad.T, wanted[:6])
        torch.testing.assert_close(model[2].bias.grad, wanted.sum(dim=0))
