"""PS-KD against its own training: losses, weights and kept predictions over four epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import cross_entropy_rows
from limbeck.core.objective import DataInfo
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes.parts.sides import TeacherShare, weigh_sides
from limbeck.schemes.self_taught.ps_kd import Remembering

with np.load(Path(__file__).parent / "ps_kd_ps_kd_pytorch.npz", allow_pickle=False) as loaded:
    NUMBERS = {k: torch.from_numpy(v) for k, v in loaded.items() if v.dtype.kind != "U"}


def test_the_authors_training() -> None:
    x, y, orders = (NUMBERS[name] for name in ("inputs", "labels", "orders"))
    epochs, alpha = len(orders), float(NUMBERS["alpha"])
    student = nn.Linear(x.shape[1], int(y.max()) + 1).double()
    with torch.no_grad():
        student.weight.copy_(NUMBERS["weight"])
        student.bias.copy_(NUMBERS["bias"])
    shares = [TeacherShare(alpha, epochs=epochs, left=left) for left in (True, False)]
    loss = weigh_sides(CrossEntropy() + KD(1.0), *shares, "the test")
    distiller = Remembering(student, loss, epochs).setup(Batch(x[:2], y[:2], torch.arange(2)), DataInfo(len(x)))
    optimizer = torch.optim.SGD(student.parameters(), float(NUMBERS["lr"]))
    found = []
    for epoch, order in enumerate(orders):
        for number, index in enumerate(order.chunk(3)):
            known = distiller.bank[index].double().log_softmax(1)
            losses = distiller(Batch(x[index], y[index], index, progress=(epoch + number / 3) / epochs))
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            share = alpha * (epoch + 1) / epochs if epoch else 0.0
            entropy = cross_entropy_rows(known.exp(), known).mean()  # theirs has it: cross-entropy, not divergence
            found.append(float(losses.total.detach() + share * entropy))
    torch.testing.assert_close(torch.tensor(found).double(), NUMBERS["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.weight, NUMBERS["final_weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.bias, NUMBERS["final_bias"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distiller.bank.softmax(1), NUMBERS["predictions"], rtol=1e-5, atol=1e-6)
