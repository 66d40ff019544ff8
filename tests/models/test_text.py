"""The text transformer: padding, order, roles, compilation, export, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.core.taps import listen
from limbeck.models import create, flops, load_model, put_head
from limbeck.models.export import export
from limbeck.models.student import describe_inputs, load_student, save_student
from limbeck.models.text import positions


def net(name: str = "text_32_2", **options: object) -> nn.Module:
    return create(name, num_classes=3, vocabulary=50, **options).eval()


def batch(lengths: tuple[int, ...] = (6, 2, 4), padded: int = 6) -> dict[str, Tensor]:
    ids = torch.zeros(len(lengths), padded, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(2, 50, (length,))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_padding_changes_nothing() -> None:
    model, inputs = net().double(), batch()
    longer = {k: torch.cat([v, torch.zeros_like(v[:, :3])], dim=1) for k, v in inputs.items()}
    torch.testing.assert_close(model(**longer), model(**inputs))
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)}
    torch.testing.assert_close(model(**other), model(**inputs))
    alone = model(input_ids=inputs["input_ids"][1:2, :2])
    torch.testing.assert_close(alone, model(**inputs)[1:2])


def test_the_order_of_words_matters() -> None:
    model, ids = net(), batch((6,))["input_ids"]
    assert not torch.allclose(model(ids), model(ids.flip(1)), atol=1e-4)


def test_a_text_of_nothing_but_padding_is_finite() -> None:
    model, inputs = net(), batch((4, 0))
    model(**inputs).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_positions_are_the_papers() -> None:
    found = positions(torch.zeros(1, 4, 6, dtype=torch.float64))
    for place in range(4):
        for i in range(3):
            angle = torch.tensor(place / 10_000 ** (2 * i / 6))
            assert found[place, i] == pytest.approx(angle.sin().item(), abs=1e-6)
            assert found[place, 3 + i] == pytest.approx(angle.cos().item(), abs=1e-6)


def test_roles() -> None:
    trace = listen(net(), batch(), ["blocks", "attention", "penultimate", "stages"])
    assert [b.shape for b in trace["blocks"]] == [(3, 6, 32)] * 2
    assert [a.shape for a in trace["attention"]] == [(3, 1, 6, 6)] * 2
    assert trace["penultimate"].shape == (3, 32)
    assert not trace["attention"][0][1, :, :, 2:].any()  # nobody asks padding
    assert len(trace["stages"]) == 1


def test_gradient_reaches_every_parameter() -> None:
    model = net().train()
    model(**batch()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not model.embedding.weight.grad[0].any()  # padding has no meaning to learn


@pytest.mark.parametrize("head", [None, *(pytest.param(h, marks=pytest.mark.slow) for h in ("subclass", "dual"))])
def test_it_ships(head: str | None, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, inputs = net(), batch()
    if head is not None:
        put_head(model, head, example=inputs)
    options = {"num_classes": 3, "vocabulary": 50}
    save_student(model, tmp_path, model="text_32_2", options=options, inputs=describe_inputs(inputs))
    torch.testing.assert_close(load_student(tmp_path).eval()(**inputs), model(**inputs))
    assert export(tmp_path, "onnx", tmp_path / "onnx", inputs)["max_difference"] < 1e-4


def test_compiled_it_computes_the_same() -> None:
    model, inputs = net(), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), model(**inputs))


def test_sizes_and_mistakes() -> None:
    assert sum(p.numel() for p in net("text_64_1").parameters()) == 50 * 64 + 12 * 64**2 + 13 * 64 + 2 * 64 + 64 * 3 + 3
    assert net("text_96_1").blocks[0].attn.heads == 3
    assert net("text_100_1").blocks[0].attn.heads == 2
    assert flops(net(), batch((6,))) > 0
    assert load_model("text_32_1", num_classes=2, in_channels=3, image_size=8)(torch.ones(1, 3).long()).shape == (1, 2)
    for wrong, told in (
        (lambda: create("text_33_1"), "even"),
        (lambda: create("text_32_1", heads=3), "heads must share dim"),
        (lambda: create("text_32_1", width=3), "no such option"),
        (lambda: create("resnet8", vocabulary=50), "takes no texts"),
        (lambda: create("text_32_1", vocabulary=0), "positive whole number"),
    ):
        with pytest.raises(ModelError, match=told):
            wrong()
