"""Students equal their teachers in which layers are skipped and units masked, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.compression import student_from

pytest.importorskip("transformers")
from tests.compression.teachers import FAMILIES, FREE_HEADS, inputs_for, logits, silence, teacher_of

#: Where layers stand, where a layer's heads and feed-forward units are read; written by hand, not asked of limbeck.
PLACES = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "roberta": ("roberta.encoder.layer", "attention.output.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin2"),
    "vit": ("vit.layers", "attention.o_proj", "mlp.fc2"),
}
T5_HEADS = [
    *(f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(4)),
    *(f"decoder.block.{i}.layer.{j}Attention.o" for i in range(3) for j in ("0.Self", "1.EncDec")),
]
T5_FFN = [
    *(f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(4)),
    *(f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(3)),
]


def readers(family: str, part: int) -> list[str]:
    if family == "t5":
        return T5_HEADS if part == 1 else T5_FFN
    return [f"{PLACES[family][0]}.{i}.{PLACES[family][part]}" for i in range(4)]


def without(teacher: Any, kept: dict[str, Tensor], names: list[str], count: int) -> Any:
    """A copy of the teacher in which what is made of dropped units is zero."""
    masked = copy.deepcopy(teacher)
    assert sorted(kept) == sorted(names)
    for name in names:
        silence(masked, name, kept[name], count)
    return masked


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_layers_left_out_are_skipped(family: str) -> None:
    teacher = teacher_of(family)
    inputs = inputs_for(teacher)
    student = student_from(teacher, layers=[0, 2]).student
    skipped = copy.deepcopy(teacher)
    stack = skipped.get_submodule(PLACES[family][0])
    for i in (1, 3):
        stack[i].register_forward_hook(
            lambda _, args, kwargs, output: (
                (args[0] if args else kwargs["hidden_states"])
                if isinstance(output, Tensor)
                else ((args[0] if args else kwargs["hidden_states"]), *output[1:])
            ),
            with_kwargs=True,
        )
    expected = logits(skipped, inputs)
    torch.testing.assert_close(logits(student, inputs), expected, rtol=0, atol=1e-12)
    assert (expected - logits(teacher, inputs)).abs().max() > 1e-3
    assert len(student.get_submodule(PLACES[family][0])) == 2


def test_layers_of_an_encoder_and_a_decoder() -> None:
    """T5 holds relative positions in its first layers only; they serve whichever layer comes first."""
    teacher = teacher_of("t5")
    inputs = inputs_for(teacher)
    made = student_from(teacher, layers={"num_layers": [1, 3], "num_decoder_layers": [2]})
    expected = copy.deepcopy(teacher)
    for stack, stay in ((expected.encoder, (1, 3)), (expected.decoder, (2,))):
        first = stack.block[0].layer[0].SelfAttention
        stack.block = torch.nn.ModuleList(stack.block[i] for i in stay)
        attention = stack.block[0].layer[0].SelfAttention
        attention.relative_attention_bias, attention.has_relative_attention_bias = first.relative_attention_bias, True
    torch.testing.assert_close(logits(made.student, inputs), logits(expected, inputs), rtol=0, atol=1e-12)
    assert (made.student.config.num_layers, made.student.config.num_decoder_layers) == (2, 1)
    assert made.report.difference == pytest.approx(0, abs=1e-12)
    assert student_from(teacher, layers=0.5).report.layers == {"num_layers": [0, 3], "num_decoder_layers": [0, 2]}


def test_what_is_listed_by_layer_follows() -> None:
    teacher = teacher_of("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=2)
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    inputs = inputs_for(teacher)
    student = student_from(teacher, layers=[1, 3]).student
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    expected = copy.deepcopy(teacher)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[i] for i in (1, 3))
    expected.config.layer_types, expected.config.num_hidden_layers = student.config.layer_types, 2
    inputs["use_cache"] = False  # whose layers would still be counted as the teacher's
    torch.testing.assert_close(logits(student, inputs), logits(expected, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("judged", ["activations", "weights"])
def test_narrow_feed_forward_networks_are_masked_ones(family: str, judged: str) -> None:
    teacher = teacher_of(family)
    inputs = inputs_for(teacher)
    made = student_from(teacher, ffn=20, importance=[inputs] if judged == "activations" else None)
    count = 128 if family == "gpt2" else 48
    masked = without(teacher, made.report.kept["ffn"], readers(family, 2), count)
    torch.testing.assert_close(logits(made.student, inputs), logits(masked, inputs), rtol=0, atol=1e-12)
    assert (logits(masked, inputs) - logits(teacher, inputs)).abs().max() > 1e-4
    assert made.report.judged_by == judged
    assert made.report.sizes["ffn"] == (count, 20)
    assert made.student.get_submodule(readers(family, 2)[0]).weight.shape in ((32, 20), (20, 32))


@pytest.mark.parametrize("family", [*FREE_HEADS, "vit"])
def test_fewer_heads_are_masked_ones(family: str) -> None:
    teacher = teacher_of(family)
    inputs = inputs_for(teacher)
    made = student_from(teacher, heads=2, importance=[inputs])
    heads = made.report.kept["heads"]
    masked = without(teacher, heads, readers(family, 1), 4)
    torch.testing.assert_close(logits(made.student, inputs), logits(masked, inputs), rtol=0, atol=1e-12)
    assert (logits(masked, inputs) - logits(teacher, inputs)).abs().max() > 1e-4
    if family in ("llama", "qwen2", "qwen3", "mistral", "phi3"):  # one head of each group: 0 or 1, and 2 or 3
        assert all(units.tolist()[0] < 2 <= units.tolist()[1] for units in heads.values())
        assert made.student.config.num_key_value_heads == 2
    assert made.report.difference == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_groups_of_heads_leave_together(family: str) -> None:
    teacher = teacher_of(family)
    inputs = inputs_for(teacher)
    made = student_from(teacher, kv_heads=1, importance=[inputs])
    assert (made.student.config.num_attention_heads, made.student.config.num_key_value_heads) == (2, 1)
    assert {tuple(u.tolist()) for u in made.report.kept["heads"].values()} <= {(0, 1), (2, 3)}
    masked = without(teacher, made.report.kept["heads"], readers(family, 1), 4)
    torch.testing.assert_close(logits(made.student, inputs), logits(masked, inputs), rtol=0, atol=1e-12)
    both = student_from(teacher, heads=1, kv_heads=1, importance=[inputs])
    masked = without(teacher, both.report.kept["heads"], readers(family, 1), 4)
    torch.testing.assert_close(logits(both.student, inputs), logits(masked, inputs), rtol=0, atol=1e-12)


def test_everything_at_once_is_layers_and_masks_together() -> None:
    teacher = teacher_of("qwen3")
    inputs = inputs_for(teacher)
    made = student_from(teacher, layers=[1, 2], heads=2, ffn=0.5, importance=[inputs])
    assert set(made.report.kept["heads"]) == set(readers("qwen3", 1)[1:3])
    masked = copy.deepcopy(teacher)
    for part, axis, count in ((1, "heads", 4), (2, "ffn", 48)):
        for name in readers("qwen3", part)[1:3]:
            silence(masked, name, made.report.kept[axis][name], count)
    masked.model.layers = torch.nn.ModuleList(masked.model.layers[i] for i in (1, 2))
    inputs["use_cache"] = False
    torch.testing.assert_close(logits(made.student, inputs), logits(masked, inputs), rtol=0, atol=1e-12)
