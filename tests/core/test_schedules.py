"""Numbers that change with progress."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import ConfigError
from limbeck.core.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Schedule,
    Step,
    WarmUp,
    parse_schedule,
)

CASES: list[tuple[Schedule, dict[float, float]]] = [
    (Constant(0.3), {0: 0.3, 0.5: 0.3, 1: 0.3}),
    (Linear(1.0, 0.0), {0: 1, 0.25: 0.75, 1: 0}),
    (Linear(-1.0, 3.0), {0.5: 1.0}),
    (Cosine(2.0, 0.0), {0: 2, 0.5: 1, 1: 0, 0.25: 1 + math.cos(math.pi / 4)}),
    (WarmUp(0.5), {0: 0, 0.25: 0.5, 0.5: 1, 1: 1}),
    (WarmUp(0.0), {0: 1, 0.5: 1}),
    (Step(8.0, (0.5, 0.75), 0.5), {0: 8, 0.49: 8, 0.5: 4, 0.8: 2, 1: 2}),
    (Step(8.0, ()), {0: 8, 1: 8}),
    (Exponential(1.0, 0.01), {0: 1, 0.5: 0.1, 1: 0.01}),
    (Exponential(-4.0, -1.0), {0.5: -2.0}),
    (2.0 * Linear(0.0, 1.0), {0.5: 1.0}),
    (WarmUp(0.5) * Constant(4.0) * Linear(1.0, 0.0), {0.25: 1.5, 0.75: 1.0}),
]


@pytest.mark.parametrize(("schedule", "values"), CASES, ids=lambda v: type(v).__name__)
def test_values(schedule: Schedule, values: dict[float, float]) -> None:
    for progress, wanted in values.items():
        assert float(schedule(progress)) == pytest.approx(wanted, abs=1e-6)
        assert float(schedule(torch.tensor(progress))) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("schedule", [s for s, _ in CASES], ids=lambda v: type(v).__name__)
def test_a_value_is_a_number_tensor_where_progress_is(schedule: Schedule) -> None:
    value = schedule(torch.tensor(0.5, device="meta"))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "meta")


@given(st.floats(0, 1), st.sampled_from([s for s, _ in CASES]))
def test_never_beyond_its_ends(progress: float, schedule: Schedule) -> None:
    assert math.isfinite(float(schedule(progress)))
    if isinstance(schedule, (Linear, Cosine, Exponential)):
        low, high = sorted((schedule.start, schedule.end))
        assert low - 1e-5 <= float(schedule(progress)) <= high + 1e-5


def test_progress_does_not_rebuild_a_compiled_graph() -> None:
    builds = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        builds.append(module)
        return module.forward

    schedule = 2.0 * (WarmUp(0.1) * Cosine(1.0, 0.0))
    run = torch.compile(schedule, backend=count, fullgraph=True)
    for progress in (0.0, 0.05, 0.5, 1.0):
        assert float(run(torch.tensor(progress))) == pytest.approx(float(schedule(progress)), abs=1e-6)
    assert len(builds) == 1


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (0.5, Constant(0.5)),
        (2, Constant(2.0)),
        ({"linear": {"start": 1, "end": 0}}, Linear(1.0, 0.0)),
        ({"warmup": None}, WarmUp()),
        ({"warmup": {}}, WarmUp(0.1)),
        ({"step": {"value": 1, "milestones": [0.5, 0.75]}}, Step(1.0, (0.5, 0.75))),
        (Cosine(1.0, 0.0), Cosine(1.0, 0.0)),
    ],
)
def test_written_forms(written: Any, wanted: Schedule) -> None:
    assert parse_schedule(written) == wanted


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"linar": {"start": 1, "end": 0}}, "loss.kd.weight: no such schedule; found 'linar'.*did you mean 'linear'"),
        ({"linear": {"start": 1}}, r"loss\.kd\.weight\.linear\.end"),
        ({"linear": {"start": 1, "stop": 0}}, r"weight\.linear\.stop: .*has no such option; wanted one of start, end"),
        ({"linear": {"start": "much", "end": 0}}, r"weight\.linear\.start.*found 'much'"),
        ({"exponential": {"start": 1, "end": 0}}, "one sign and are not zero; found start=1.0, end=0.0"),
        ({"linear": 3}, r"loss\.kd\.weight"),
        ({"linear": {}, "cosine": {}}, "not a schedule"),
        ({"product": {"first": 1}}, "two factors"),
        ({"product": {"first": 1, "second": {"warmup": {"untill": 1}}}}, "no such option"),
        ({"linear": {1: 2}}, r"weight\.linear\.1: .*has no such option"),
        (True, "not a schedule; found True"),
        ("0.5", "not a schedule"),
        (None, "not a schedule"),
        ([1], "not a schedule"),
    ],
)
def test_mistakes_in_the_written_form_are_one_readable_error(written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_schedule(written, where="loss.kd.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="weight"):
        parse_schedule(value, where="weight")


def test_a_product_is_written_and_read_back() -> None:
    schedule = 1089.0 * WarmUp(0.25)
    assert parse_schedule(schedule.written()) == schedule
    assert float(parse_schedule(schedule.written())(0.125)) == pytest.approx(544.5)
