from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.conformance.models import TextModel
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives import MiniLM
from limbeck.objectives.relation.minilm import minilm_loss


def rows(x: list[list[float]], y: list[list[float]]) -> list[list[float]]:
    found = []
    for p in x:
        powers = [exp(sum(a * b for a, b in zip(p, q, strict=True)) / sqrt(len(p))) for q in y]
        found.append([v / sum(powers) for v in powers])
    return found


def relation(x: Tensor, y: Tensor, heads: int) -> list[list[list[float]]]:
    width = x.shape[-1] // heads
    cut = [slice(a * width, (a + 1) * width) for a in range(heads)]
    return [rows(x[:, c].tolist(), y[:, c].tolist()) for c in cut]


def reference(x: Tensor, teacher_x: Tensor, y: Tensor, teacher_y: Tensor, heads: int, lengths: list[int]) -> float:
    total = 0.0
    for i, n in enumerate(lengths):
        pairs = zip(
            relation(teacher_x[i, :n], teacher_y[i, :n], heads), relation(x[i, :n], y[i, :n], heads), strict=True
        )
        kl = [
            sum(a * log(a / b) for a, b in zip(p, q, strict=True)) for t, s in pairs for p, q in zip(t, s, strict=True)
        ]
        total += sum(kl) / (heads * n)
    return total / len(lengths)


@pytest.mark.parametrize(("heads", "lengths"), [(1, [4, 4]), (2, [5, 3, 1]), (4, [2])])
def test_equals_the_paper(heads: int, lengths: list[int]) -> None:
    shape = (len(lengths), max(lengths))
    x, y, teacher_x, teacher_y = (torch.randn(*shape, d).double() for d in (8, 8, 12, 12))
    mask = torch.tensor([[t < n for t in range(shape[1])] for n in lengths])
    found = minilm_loss(x, teacher_x, y, teacher_y, heads=heads, mask=mask)
    assert found.item() == pytest.approx(reference(x, teacher_x, y, teacher_y, heads, lengths), rel=1e-9)
    own = minilm_loss(x, teacher_x, heads=heads, mask=mask)
    assert own.item() == pytest.approx(reference(x, teacher_x, x, teacher_x, heads, lengths), rel=1e-9)


def test_maps_are_the_relation_of_queries_and_keys() -> None:
    q, k, teacher_q, teacher_k = (torch.randn(2, 4, d).double() for d in (6, 6, 8, 8))

    def maps(q: Tensor, k: Tensor) -> Tensor:
        q, k = (v.unflatten(-1, (2, -1)).transpose(1, 2) for v in (q, k))
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)

    wanted = minilm_loss(q, teacher_q, k, teacher_k, heads=2)
    torch.testing.assert_close(minilm_loss(maps(q, k), maps(teacher_q, teacher_k), heads=None), wanted)


def test_causal_maps_stay_finite() -> None:
    causal = torch.tril(torch.ones(2, 3, 4, 4))
    student = (causal / causal.sum(-1, keepdim=True)).requires_grad_()
    teacher = torch.rand(2, 3, 4, 4) * causal
    value = minilm_loss(student, teacher / teacher.sum(-1, keepdim=True), heads=None)
    value.backward()
    assert value > 0
    assert student.grad.isfinite().all()


def test_a_fused_layer_is_taken_apart() -> None:
    student, teacher = TextModel(8, 2, 3, pool=True), TextModel(12, 3, 3, pool=True)
    batch = Batch(torch.randint(0, 16, (3, 5)))
    found = Distiller(student, MiniLM(["vv", "qk"]), teacher).setup(batch)(batch)

    def parts(model: TextModel) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        handle = model.blocks[-1].attention.qkv.register_forward_hook(lambda m, i, o: kept.append(o))
        model(batch.inputs)
        handle.remove()
        return kept[0].chunk(3, dim=-1)

    (q, k, v), (teacher_q, teacher_k, teacher_v) = parts(student), parts(teacher)
    torch.testing.assert_close(found.terms["minilm/vv"], minilm_loss(v, teacher_v, heads=4).detach())
    torch.testing.assert_close(found.terms["minilm/qk"], minilm_loss(q, teacher_q, k, teacher_k, heads=4).detach())


def test_bert_like_models_have_the_taps() -> None:
    transformers = pytest.importorskip("transformers")

    def model(width: int, layers: int, heads: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=16
        )
        config._attn_implementation = "eager"
        return transformers.BertModel(config)

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs = {"input_ids": torch.randint(0, 30, (2, 4)), "attention_mask": mask}
    batch = Batch(inputs, mask=mask.bool())
    student = model(8, 1, 2)
    for objective, teacher in ((MiniLM(), model(16, 2, 2)), (MiniLM(["qq", "kk", "vv"], 0, 1), model(24, 3, 3))):
        losses = Distiller(student, objective, teacher).setup(batch)(batch)
        losses.total.backward()
        assert sorted(losses.terms) == [f"minilm/{r}" for r in sorted(objective.relations)]
    assert student.encoder.layer[-1].attention.self.value.weight.grad.any()


def test_misfits_are_refused() -> None:
    with pytest.raises(TensorError, match="cut into heads"):
        minilm_loss(torch.randn(2, 3, 8), torch.randn(2, 3, 8), heads=3)
    with pytest.raises(TensorError, match="differ in shape"):
        minilm_loss(torch.rand(2, 3, 4, 4), torch.rand(2, 2, 4, 4), heads=None)
    with pytest.raises(ConfigError, match="not one place each"):
        MiniLM(layer=["a", "b", "c"])
