"""Which layers stay, and how layers are judged."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from limbeck.compression import angular_block_scores, angular_distance, block_influence, choose_layers, student_from
from limbeck.core.errors import ConfigError

pytest.importorskip("transformers")
from tests.compression.teachers import inputs_for, logits, teacher_of


def with_idle_layer(layer: int, family: str = "llama") -> object:
    """A teacher one of whose layers hands on what it is given."""
    teacher = copy.deepcopy(teacher_of(family))
    with torch.no_grad():
        if family == "t5":
            for stack in (teacher.encoder, teacher.decoder):
                for part in stack.block[layer].layer:
                    last = part.DenseReluDense.wo if hasattr(part, "DenseReluDense") else None
                    last = last or (part.SelfAttention if hasattr(part, "SelfAttention") else part.EncDecAttention).o
                    last.weight.zero_()
        else:
            for part in (teacher.model.layers[layer].self_attn.o_proj, teacher.model.layers[layer].mlp.down_proj):
                part.weight.zero_()
                if part.bias is not None:
                    part.bias.zero_()
    return teacher


def states(teacher: object, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What enters each layer, and what leaves the last one (before the last norm), ``[B, T, D]``."""
    found: list[Tensor] = []
    layers = teacher.model.layers  # type: ignore[attr-defined]
    handles = [layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    handles += [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in layers]
    logits(teacher, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("depth", [1, 2, 5, 12, 24])
def test_even_spacing_keeps_the_first_and_the_last(depth: int) -> None:
    for number in range(1, depth + 1):
        stay = choose_layers(depth, number)
        assert len(set(stay)) == len(stay) == number
        assert stay[0] == 0
        assert stay[-1] == (depth - 1 if number > 1 else 0)
        gaps = [b - a for a, b in itertools.pairwise(stay)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_ends_are_kept_as_asked() -> None:
    assert choose_layers(6, 3, "first_last") == (0, 1, 5)
    assert choose_layers(6, 4, "first_last") == (0, 1, 4, 5)
    assert choose_layers(6, 2, "first") == (0, 1)
    assert choose_layers(6, 2, "last") == (4, 5)
    assert choose_layers(4, 2, "similarity", torch.tensor([0.1, 0.4, 0.3, 0.3])) == (1, 2)
    assert choose_layers(4, 2, "angular", torch.tensor([0.3, 0.1, 0.2])) == (0, 3)
    assert choose_layers(4, 4, "similarity") == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="found 0; wanted 1 to 4"):
        choose_layers(4, 0)


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    teacher = teacher_of("llama")
    batches = [inputs_for(teacher, seed=1), inputs_for(teacher, seed=2)]
    found = block_influence(teacher, batches)["num_hidden_layers"]
    flows = [states(teacher, inputs) for inputs in batches]
    counts = torch.cat([inputs["attention_mask"].flatten() for inputs in batches]).bool()
    for layer in range(4):
        first, second = (torch.cat([flow[layer + i].flatten(0, 1) for flow in flows])[counts] for i in (0, 1))
        cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
        assert float(found[layer]) == pytest.approx(float((1 - cosine).mean()), rel=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_angular_scores_look_at_the_last_token_that_counts(number: int) -> None:
    teacher = teacher_of("llama")
    inputs = inputs_for(teacher)
    found = angular_block_scores(teacher, [inputs], number)["num_hidden_layers"]
    flow = states(teacher, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    expected = []
    for layer in range(5 - number):
        angles = []
        for row, place in enumerate(last.tolist()):
            a, b = flow[layer][row, place], flow[layer + number][row, place]
            angles.append(math.acos(min(float(a @ b / (a.norm() * b.norm())), 1.0)) / math.pi)
        expected.append(sum(angles) / len(angles))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6, check_dtype=False)
    if number == 0:
        assert not found.any()


def test_angles() -> None:
    first = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    second = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-2.0, 0.0]])
    torch.testing.assert_close(angular_distance(first, second), torch.tensor([0.0, 0.5, 1.0]))
    near = angular_distance(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-5]))  # whose cosine is 1 in float32
    assert float(near) == pytest.approx(1e-5 / math.pi, rel=1e-4)


@pytest.mark.parametrize("choose", ["similarity", "angular"])
@pytest.mark.parametrize("idle", [0, 2, 3])
def test_a_layer_that_does_nothing_is_left_out(choose: str, idle: int) -> None:
    teacher = with_idle_layer(idle)
    inputs = inputs_for(teacher)
    made = student_from(teacher, layers=3, choose=choose, importance=[inputs])
    assert made.report.layers == {"num_hidden_layers": [i for i in range(4) if i != idle]}
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=1e-12)
    assert made.report.agreement == {"kl": pytest.approx(0, abs=1e-12), "top1": 1.0}


def test_stacks_are_judged_apart() -> None:
    teacher = with_idle_layer(1, "t5")
    inputs = inputs_for(teacher)
    made = student_from(
        teacher, layers={"num_layers": 3, "num_decoder_layers": 2}, choose="similarity", importance=[inputs]
    )
    assert made.report.layers == {"num_layers": [0, 2, 3], "num_decoder_layers": [0, 2]}
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=1e-12)
