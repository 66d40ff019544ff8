"""Mixtures of experts whose tokens ask other experts: exact where they ask the same, and nothing in them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.hashing import key
from limbeck.core.teacher import FrozenTeacher
from limbeck.teachers.experts import EveryExpert, ExpertsTeacher, drawn, every, routed, routers_of, top, weighed

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(21).view(3, 7) % 19}
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "eos_token_id": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Olmoe": {"num_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 8, "norm_topk_prob": True},
}


def mixture(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **HEADS, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=2.0)
        elif "experts" in name:
            parameter.data *= 20
    return model


def attached(teacher: Any) -> Any:
    teacher.attach(("logits",), Batch(IDS))
    return teacher


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_number_of_experts_is_the_model(kind: str) -> None:
    """Bit for bit, whether the model scales its experts' weights to one or not."""
    model = mixture(kind)
    teacher = attached(ExpertsTeacher(model, passes=1, chance=0.0, experts=2))
    assert torch.equal(teacher(Batch(IDS)).logits, model(**IDS).logits)
    assert torch.equal(attached(FrozenTeacher(model))(Batch(IDS)).logits, model(**IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_are_the_sum_over_all_of_them(kind: str) -> None:
    """The layer's output beside the sum of every expert, each run for itself by its slice of the fused weights."""
    model = mixture(kind)
    teacher = attached(EveryExpert(model))
    layer = model.model.layers[0].mlp
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), y=out.detach()))
    with torch.no_grad():
        teacher(Batch(IDS))
        handle.remove()
        x = seen["x"].reshape(-1, 16)
        gates = torch.softmax(x @ layer.gate.weight.T, dim=-1)
        torch.testing.assert_close(gates.sum(dim=1), torch.ones(len(x)))
        whole = torch.zeros_like(x)
        for expert in range(6):
            gate, up = (x @ layer.experts.gate_up_proj[expert].T).chunk(2, dim=1)
            own = (layer.experts.act_fn(gate) * up) @ layer.experts.down_proj[expert].T
            whole += gates[:, expert : expert + 1] * own
        if kind == "Qwen2Moe":
            whole += torch.sigmoid(layer.shared_expert_gate(x)) * layer.shared_expert(x)
    torch.testing.assert_close(seen["y"].reshape(-1, 16), whole, rtol=1e-4, atol=1e-5)


def test_weights_of_the_chosen_sum_to_one() -> None:
    model = mixture("Mixtral")
    (first, _) = routers_of(model, IDS)
    logits = torch.randn(40, 6)
    for indices in (drawn(logits, 5, 0.5), every(logits, first), top(logits, 3)):
        scores, _ = weighed(logits, indices, first)
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(40))
        assert all(len(set(row)) == len(row) for row in indices.tolist())


def test_how_often_experts_are_drawn_and_which() -> None:
    """With one of two drawn, its frequency is its probability; without a chance the first are taken."""
    logits = torch.tensor([[0.0, 1.5]]).expand(20000, 2)
    share = (drawn(logits, 1, 1.0) == 1).float().mean().item()
    assert share == pytest.approx(torch.sigmoid(torch.tensor(1.5)).item(), abs=0.015)
    half = (drawn(logits, 1, 0.3) == 1).float().mean().item()
    assert half == pytest.approx(0.7 + 0.3 * share, abs=0.015)
    assert torch.equal(drawn(logits, 1, 0.0), torch.ones(20000, 1, dtype=torch.long))


def test_passes_are_members_that_differ_where_experts_are_drawn() -> None:
    model = mixture("Mixtral")
    teacher = attached(ExpertsTeacher(model, passes=3, chance=1.0))
    torch.manual_seed(key(1) % 1000)
    trace = teacher(Batch(IDS))
    assert len(trace.members) == 3
    assert torch.equal(trace.logits, trace.members[0].logits)
    assert not torch.equal(trace.members[0].logits, trace.members[1].logits)
    steady = attached(ExpertsTeacher(model, passes=2, chance=0.0))(Batch(IDS))
    assert torch.equal(steady.members[0].logits, steady.members[1].logits)
    assert not torch.equal(steady.logits, model(**IDS).logits)  # five of six are asked instead of two


def test_routers_of_ones_own_get_all_the_gradient() -> None:
    model = mixture("Olmoe")
    teacher, before = attached(EveryExpert(model)), parameters(model)
    teacher.weights = [{"weight": nn.Parameter(r.module.weight.detach().clone())} for r in teacher.routers]
    said, gates = teacher.learning(Batch(IDS))
    torch.testing.assert_close(said.logits.detach(), teacher(Batch(IDS)).logits)
    assert [list(g.shape) for g in gates] == [[21, 6], [21, 6]]
    said.logits.square().sum().backward()
    assert all(bool(held["weight"].grad.any()) for held in teacher.weights)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        teacher.weights[0]["weight"] += 1.0 * torch.randn(6, 16)
    assert not torch.equal(teacher(Batch(IDS)).logits, said.logits)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nothing_is_left_on_the_model() -> None:
    model = mixture("Mixtral")
    wanted = model(**IDS).logits
    with routed(routers_of(model, IDS), every):
        assert not torch.equal(model(**IDS).logits, wanted)
    assert torch.equal(model(**IDS).logits, wanted)
    assert not any(m._forward_hooks for m in model.modules())


def test_what_it_refuses() -> None:
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_attention_heads=2))
    with pytest.raises(ModelError, match="no routers"):
        attached(ExpertsTeacher(dense))
    with pytest.raises(ConfigError, match=r"experts.*found 7; wanted 1 to 6"):
        attached(ExpertsTeacher(mixture("Mixtral"), experts=7))
    with pytest.raises(ConfigError, match="chance"):
        ExpertsTeacher(dense, chance=1.5)
    model = mixture("Mixtral")
    for layer in model.model.layers:  # chooses the least probable
        layer.mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[1], out[2].flip(1)))
    with pytest.raises(ModelError, match="another way"):
        routers_of(model, IDS)
