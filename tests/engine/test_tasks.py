"""Training is judged by what the data's labels mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.data import as_loader, build_loader, tensors
from limbeck.engine import Stage, TrainConfig, evaluate, fit
from limbeck.objectives import MSE, BinaryCrossEntropy


def multilabel():
    inputs = torch.randn(120, 5)
    labels = (inputs @ torch.randn(5, 3) + torch.randn(120, 3) > 0).float()
    source = tensors(inputs, labels, task="multilabel", validation=0.3)
    return [build_loader(s, batch_size=21, train=t) for s, t in ((source.train, True), (source.validation, False))]


def test_the_best_of_multi_label_data_is_the_one_with_the_best_average_precision(tmp_path):
    train, validation = multilabel()
    config = TrainConfig(epochs=4, lr=0.5, select="best", patience=3)
    stage = Stage("bce", Distiller(nn.Linear(5, 3), BinaryCrossEntropy()), config)
    result = fit([stage], train, validation, out=tmp_path, quiet=True)
    seen = [line["map_macro"] for line in result.history if line["split"] == "validation"]
    assert result.best["metric"] == "map_macro"
    assert result.best["value"] == max(seen)
    assert evaluate(result.student, validation)["map_macro"] == pytest.approx(max(seen))


def test_another_of_its_figures_can_be_watched():
    train, validation = multilabel()
    for monitor in ("f1_micro", "nll"):
        stage = Stage("bce", Distiller(nn.Linear(5, 3), BinaryCrossEntropy()), TrainConfig(epochs=1, monitor=monitor))
        assert fit([stage], train, validation, quiet=True).best["metric"] == monitor
    stage = Stage("bce", Distiller(nn.Linear(5, 3), BinaryCrossEntropy()), TrainConfig(epochs=1, monitor="accuracy"))
    with pytest.raises(
        ConfigError, match=r"monitor: the validation does not tell this; found accuracy; wanted .*map_macro"
    ):
        fit([stage], train, validation, quiet=True)


def test_a_regression_improves_as_its_error_falls():
    inputs = torch.randn(60, 4)
    labels = inputs @ torch.randn(4, 2)
    loaders = [as_loader((inputs, labels), batch_size=20, train=t, task="regression") for t in (True, False)]
    stage = Stage("mse", Distiller(nn.Linear(4, 2), MSE()), TrainConfig(epochs=5, lr=0.1))
    best = fit([stage], *loaders, quiet=True).best
    assert best["metric"] == "mse"
    assert best["step"] > 3
