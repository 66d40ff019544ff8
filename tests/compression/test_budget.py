"""Budgets of parameters and of time: met, nearly used up, and what they are told to cut is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.compression import student_from
from limbeck.core.errors import ConfigError

pytest.importorskip("transformers")
from tests.compression.teachers import inputs_for, teacher_of


def big(family: str = "llama", **options: Any) -> Any:
    """A teacher large enough for multiples of 8 and of 64."""
    import transformers

    given = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    given |= {"num_attention_heads": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    classes = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "bert": ("BertConfig", "BertForMaskedLM")}[family]
    given |= {"num_key_value_heads": 4} if family == "llama" else {"max_position_embeddings": 64}
    return getattr(transformers, classes[1])(getattr(transformers, classes[0])(**{**given, **options}))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
def test_budgets_of_parameters_are_met(family: str, share: float) -> None:
    teacher = big(family)
    made = student_from(teacher, parameters=share)
    whole = sum(p.numel() for p in teacher.parameters())
    count = sum(p.numel() for p in made.student.parameters())
    assert 0.75 * share * whole <= count <= share * whole
    (budget,) = made.report.budgets
    assert (budget.of, budget.asked, budget.limit, budget.met) == ("parameters", share, int(share * whole), count)
    config = made.student.config
    assert config.num_hidden_layers >= (4 if share >= 0.25 else 1)
    assert config.intermediate_size % 64 == 0
    assert made.report.parameters == (whole, count)
    made.student(torch.randint(0, 100, (2, 5)))


def test_depth_goes_first_then_widths() -> None:
    teacher = big()
    first = student_from(teacher, parameters=0.8).student.config
    assert first.num_hidden_layers == 6
    assert (first.intermediate_size, first.num_attention_heads, first.hidden_size) == (512, 8, 128)
    second = student_from(teacher, parameters=0.4).student.config
    assert second.num_hidden_layers == 4
    assert second.intermediate_size < 512
    assert second.num_attention_heads < 8
    assert second.num_attention_heads == 2 * second.num_key_value_heads  # groups stay whole
    assert second.hidden_size == 128


def test_a_number_of_parameters_and_what_is_given_stays() -> None:
    teacher = big()
    made = student_from(teacher, parameters=600_000, layers=[0, 3, 7], heads=8)
    config = made.student.config
    assert made.report.layers == {"num_hidden_layers": [0, 3, 7]}
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert 500_000 < made.report.parameters[1] <= 600_000
    assert made.report.budgets[0].limit == 600_000
    roomy = student_from(teacher, parameters=1.0).report
    assert roomy.parameters[0] == roomy.parameters[1]


def test_what_cannot_be_cut_alone_is_left() -> None:
    teacher = teacher_of("t5")
    report = student_from(teacher, parameters=0.3).report
    assert report.parameters[1] <= 0.3 * report.parameters[0]
    assert report.sizes["hidden"] == (32, 32)
    assert report.layers["num_layers"][-1] == 3
    assert len(report.layers["num_decoder_layers"]) >= 1
    with pytest.raises(ConfigError, match="no student on the path is that small; found [0-9]+ parameters at the least"):
        student_from(teacher, parameters=1000)


def test_layers_are_chosen_as_asked_within_a_budget() -> None:
    teacher = teacher_of("llama")
    inputs = inputs_for(teacher)
    report = student_from(teacher, parameters=0.8, choose="last", importance=[inputs], ffn=48).report
    assert report.layers == {"num_hidden_layers": [1, 2, 3]}


def test_budgets_of_time_are_met_and_reported() -> None:
    """Twelve layers against a budget that three of them use up: far enough apart for a busy machine."""
    teacher = big(num_hidden_layers=12)
    example = {"input_ids": torch.randint(0, 100, (2, 16))}
    # The clock of this machine, now: what a quarter of the teacher takes, and half as much again.
    quarter = student_from(teacher, layers=3, latency=1e6, example=example).report
    assert quarter.latency is not None
    limit = 1.5 * quarter.latency[1]
    if limit > 0.8 * quarter.latency[0]:
        pytest.skip("the machine is too busy to time anything")
    made = student_from(teacher, latency=limit, example=example)
    report = made.report
    assert len(report.layers["num_hidden_layers"]) < 12
    assert report.latency is not None
    assert report.latency[1] < report.latency[0]
    (budget,) = report.budgets
    assert (budget.of, budget.limit, budget.met) == ("latency", limit, report.latency[1])
    assert report.written()["latency_ms"] == {"before": report.latency[0], "after": report.latency[1]}


def test_a_budget_of_time_that_cannot_be_met_tells_the_fastest() -> None:
    with pytest.raises(ConfigError, match="latency: no student on the path is that fast here; found [0-9.e-]+ ms"):
        student_from(teacher_of("llama"), latency=1e-6)
    with pytest.raises(ConfigError, match="latency: a budget is above zero"):
        student_from(teacher_of("llama"), latency=-1.0)
