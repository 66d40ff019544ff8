"""One call makes a student: a model of its own, that loads without limbeck and trains; and mistakes are told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.compression import student_from
from limbeck.core.errors import ConfigError, DataError, ModelError

pytest.importorskip("transformers")
from tests.compression.teachers import (
    DECODERS,
    FAMILIES,
    FREE_HEADS,
    inputs_for,
    logits,
    teacher_of,
)


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
