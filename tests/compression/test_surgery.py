"""Students equal their teachers without what was taken away, in every family, and load without limbeck."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.compression import student_from
from limbeck.core.errors import ConfigError, DataError, ModelError

pytest.importorskip("transformers")
from tests.compression.teachers import (
    DECODERS,
    FAMILIES,
    FREE_HEADS,
    inputs_for,
    logits,
    silence,
    teacher_of,
)

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


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family: str) -> None:
    teacher = teacher_of(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    inputs = inputs_for(teacher)
    made = student_from(teacher)
    assert type(made.student) is type(teacher)
    assert made.student is not teacher
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=0)
    assert made.report.parameters[0] == made.report.parameters[1] == sum(p.numel() for p in teacher.parameters())
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in made.student.parameters()}
    assert not shared
    assert all(p.requires_grad for p in made.student.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


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


def test_students_load_without_limbeck(tmp_path: Path) -> None:
    families = ("llama", "qwen2", "phi3", "gpt2", "opt", "bert", "distilbert", "t5")
    answers, code = {}, ["import sys, torch, transformers"]
    for family in families:
        teacher = teacher_of(family)
        inputs = inputs_for(teacher)
        cuts: dict[str, Any] = {"heads": 2} if family in FREE_HEADS else {"hidden": 16}
        cuts |= {"layers": 2, "ffn": 20, "vocabulary": list(range(30)), "importance": [inputs], "unknown": 0}
        student = student_from(teacher, **cuts).student
        student.save_pretrained(tmp_path / family)
        inputs = {k: v % 30 if k.endswith("ids") else v for k, v in inputs.items()}
        answers[family] = logits(student, inputs)
        torch.save(inputs, tmp_path / f"{family}.inputs")
        code += [
            f"model = transformers.{type(teacher).__name__}.from_pretrained({family!r}, dtype=torch.float64).eval()",
            f"inputs = torch.load('{family}.inputs', weights_only=True)",
            f"with torch.no_grad(): torch.save(model(**inputs).logits, '{family}.logits')",
        ]
    code += ["assert not any(name.startswith('limbeck') for name in sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for family, expected in answers.items():
        found = torch.load(tmp_path / f"{family}.logits", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=family)


def test_embeddings_are_tied_and_untied() -> None:
    teacher = teacher_of("qwen2")
    inputs = inputs_for(teacher)
    apart = student_from(teacher, tie=False)
    assert apart.student.lm_head.weight is not apart.student.model.embed_tokens.weight
    assert apart.report.parameters[1] == apart.report.parameters[0] + 40 * 32
    torch.testing.assert_close(logits(apart.student, inputs), logits(teacher, inputs), rtol=0, atol=0)
    one = student_from(apart.student, tie=True)
    assert one.student.lm_head.weight is one.student.model.embed_tokens.weight
    torch.testing.assert_close(logits(one.student, inputs), logits(teacher, inputs), rtol=0, atol=0)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration always ties"):
        student_from(teacher_of("t5"), tie=False)
    with pytest.raises(ModelError, match="ViTForImageClassification cannot tie"):
        student_from(teacher_of("vit"), tie=True)


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "opt"])
def test_students_generate(family: str) -> None:
    student = student_from(teacher_of(family), layers=2, ffn=20).student
    ids = inputs_for(student)["input_ids"][:1]
    greedy = student.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for place in range(ids.shape[1], greedy.shape[1]):  # the cache gives what a run without it gives
        last = logits(student, {"input_ids": greedy[:, :place], "attention_mask": torch.ones_like(greedy[:, :place])})
        assert int(last[0, -1].argmax()) == int(greedy[0, place])


def test_the_student_trains_and_the_teacher_keeps_its_modes() -> None:
    teacher = copy.deepcopy(teacher_of("llama")).train().requires_grad_(False)
    inputs = inputs_for(teacher)
    state = torch.random.get_rng_state()
    student = student_from(teacher, ffn=20, importance=[inputs]).student
    assert torch.equal(state, torch.random.get_rng_state())
    assert teacher.training
    assert not student.training
    student.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_precision_stays() -> None:
    teacher = copy.deepcopy(teacher_of("llama")).bfloat16()
    made = student_from(teacher, ffn=20, heads=2)
    assert made.student.dtype == torch.bfloat16
    assert made.report.difference is not None
    assert made.report.difference < 0.05


def test_the_report_is_plain() -> None:
    import json

    teacher = teacher_of("llama")
    inputs = inputs_for(teacher)
    made = student_from(teacher, layers=2, ffn=24, importance=[inputs])
    told = json.loads(json.dumps(made.report.written()))
    assert told["layers"] == {"num_hidden_layers": {"kept": [0, 3], "of": 4}}
    assert told["sizes"]["ffn"] == {"before": 48, "after": 24}
    assert told["parameters"]["after"] == sum(p.numel() for p in made.student.parameters())
    # Agreement against the definition, over tokens that are no padding.
    first, second = (logits(m, inputs).log_softmax(-1) for m in (teacher, made.student))
    counts = inputs["attention_mask"].bool()
    kl = (first.exp() * (first - second)).sum(-1)[counts].mean()
    assert told["agreement"]["kl"] == pytest.approx(float(kl), rel=1e-6)
    same = (first.argmax(-1) == second.argmax(-1))[counts].double().mean()
    assert told["agreement"]["top1"] == pytest.approx(float(same), rel=1e-6)


def test_models_without_logits_are_compared_by_their_hidden_states() -> None:
    from transformers import BertModel

    teacher = BertModel(teacher_of("bert").config).double().eval()
    made = student_from(teacher, layers=3, importance=[inputs_for(teacher)])
    assert made.report.agreement is not None
    assert 0 < made.report.agreement["cosine"] < 1
    same = student_from(teacher, importance=[inputs_for(teacher)])
    assert same.report.agreement == {"cosine": pytest.approx(1.0)}


def test_calibration_may_be_anything_a_collator_gives() -> None:
    from limbeck import Batch

    teacher = teacher_of("llama")
    ids = inputs_for(teacher)["input_ids"]
    kept = [
        student_from(teacher, ffn=20, importance=batches).report.kept["ffn"]
        for batches in (
            [ids],
            [{"input_ids": ids, "labels": ids}],
            [Batch({"input_ids": ids})],
            ({"input_ids": x.unsqueeze(0)} for x in ids),
        )
    ]
    assert all(torch.equal(other[name], units) for other in kept[1:] for name, units in kept[0].items())
    with pytest.raises(DataError, match="no calibration batch"):
        student_from(teacher, ffn=20, importance=[])
    with pytest.raises(DataError, match="what its decoder sees"):
        student_from(teacher_of("t5"), ffn=20, importance=[ids])


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"layers": 5}, "layers: .*found 5.*wanted 1 to 4"),
        ({"layers": [2, 1]}, "layers: not layers of the teacher"),
        ({"layers": []}, "layers: not layers of the teacher"),
        ({"layers": {"depth": 2}}, "no such stack.*num_hidden_layers"),
        ({"layers": 2, "choose": "best"}, "choose: no such choice.*similarity"),
        ({"layers": 2, "choose": "similarity"}, "importance: .*give calibration batches"),
        ({"ffn": 0}, "ffn: .*found 0"),
        ({"ffn": True}, "ffn: "),
        ({"ffn": 1.5}, "ffn: .*share"),
        ({"heads": 3}, "heads=3, kv_heads=2"),
        ({"heads": 4, "kv_heads": 1}, "at most 2 times"),
        ({"hidden": 30}, "'llama' refuses this size.*hidden_size=30"),
        ({"parameters": 0.01}, "no student on the path is that small.*parameters at the least"),
        ({"parameters": 0}, "parameters: a budget is above zero"),
        ({"unknown": 3}, "unknown: no token is dropped"),
        ({"vocabulary": 10}, "importance: how often tokens come"),
    ],
)
def test_mistakes_are_told(cut: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        student_from(teacher_of("llama"), **cut)


def test_teachers_that_cannot_be_cut() -> None:
    with pytest.raises(ModelError, match="only transformers models are cut; found Linear"):
        student_from(torch.nn.Linear(2, 2), layers=1)  # type: ignore[arg-type]
