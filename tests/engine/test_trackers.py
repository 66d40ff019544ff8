"""Trackers of accelerate get the same numbers as metrics.jsonl."""

from __future__ import annotations

import pytest

from limbeck.engine import Stage, TrainConfig, fit


def test_tensorboard(loader, distiller, tmp_path, capfd):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(epochs=2, log_every=3, trackers=["tensorboard"])
    result = fit([Stage("kd", distiller(), config)], loader(), loader(train=False), out=tmp_path, quiet=True)
    assert capfd.readouterr() == ("", "")
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*") if file.parent.name == "limbeck"}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    for split, tag, key in (("train", "train/total", "total"), ("validation", "validation/accuracy", "accuracy")):
        found = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]
        assert [(line["step"], line[key]) for line in result.history if line["split"] == split] == found
    assert events.Scalars("train/kd")
