"""How similar tasks are: PARC against SciPy, what it does not depend on, and weights of sources."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.decomposition import PCA

from limbeck.core.errors import TensorError
from limbeck.core.task_similarity import nearest_neighbours, parc, ranks, source_weights


def test_ranks_are_scipy_s() -> None:
    values = torch.randint(0, 8, (60,)).double()
    assert ranks(values).tolist() == (rankdata(values.numpy()) - 1).tolist()


def test_parc_is_spearman_s_correlation_of_distances() -> None:
    x, y = torch.randn(40, 7).double(), torch.arange(40) % 4
    first = 1 - torch.corrcoef(x)
    second = (y[:, None] != y[None]).double()  # any two classes are as far from each other
    below = torch.ones(40, 40).tril(-1).bool()
    wanted = 100 * spearmanr(first[below].numpy(), second[below].numpy()).statistic
    assert float(parc(x, y)) == pytest.approx(wanted, abs=1e-4)


def test_of_labels_themselves_it_is_100_and_of_noise_about_0() -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 5
    assert float(parc(torch.eye(5)[y], y)) == pytest.approx(100, abs=1e-3)
    assert abs(float(parc(torch.randn(200, 64), y))) < 2
    assert float(parc(torch.eye(5)[y] + 0.3 * torch.randn(200, 5), y)) > 50


def test_scale_and_a_shift_of_each_sample_change_nothing() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 6).double(), torch.arange(30) % 3
    wanted = float(parc(x, y))
    assert float(parc(7 * x + torch.randn(30, 1), y)) == pytest.approx(wanted, abs=1e-4)
    assert float(parc(x, y + 4)) == pytest.approx(wanted)  # classes are names


def test_components_are_scikit_learn_s() -> None:
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.cat([10 * torch.eye(3)[y], torch.randn(60, 20)], dim=1).double()
    reduced = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(x.numpy()))
    assert float(parc(x, y, reduce=5)) == pytest.approx(float(parc(reduced, y)), abs=1e-3)


def test_neighbours_are_counted_one_by_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.arange(20) % 3
    right = 0
    for i in range(20):
        others = [j for j in range(20) if j != i]
        best = max(others, key=lambda j: float(torch.cosine_similarity(x[i], x[j], dim=0)))
        right += int(y[best] == y[i])
    assert float(nearest_neighbours(x, y)) == pytest.approx(100 * right / 20)


def test_weights_of_sources() -> None:
    scores = torch.tensor([30.0, 20.0, -10.0])
    torch.testing.assert_close(source_weights(scores, 0.0), torch.full((3,), 1 / 3))
    assert float(source_weights(scores, 50.0)[0]) > 0.999
    for power in (0.0, 1.0, 10.0, 1000.0):
        for norm in ("clip", "minmax"):
            assert float(source_weights(scores, power, norm).sum()) == pytest.approx(1.0)
    torch.testing.assert_close(source_weights(scores, 1.0), torch.tensor([0.6, 0.4, 0.0]))
    torch.testing.assert_close(source_weights(scores, 1.0, "minmax"), torch.tensor([4 / 7, 3 / 7, 0.0]))
    assert source_weights(scores, 1.0, keep=1).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(source_weights(-scores.abs(), 3.0), torch.full((3,), 1 / 3))


def test_mistakes() -> None:
    with pytest.raises(TensorError, match="same samples"):
        parc(torch.randn(5, 2), torch.zeros(4, dtype=torch.long))
