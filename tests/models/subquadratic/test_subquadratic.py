"""Mixers of linear cost: matrix, chunks and steps agree; masks, folders, copies of teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, ModelError
from limbeck.models.generating import Decoding, write
from limbeck.models.student import load_student, save_student
from limbeck.models.subquadratic import subquadratic
from limbeck.models.subquadratic.mixers import MIXERS
from limbeck.models.subquadratic.recurrence import mixing_matrix, scan
from limbeck.models.subquadratic.teacher import copy_from, subquadratic_from

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = 20


def teacher(kind: str = "Llama", **more: Any) -> Any:
    import transformers

    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(vocab_size=WORDS, num_hidden_layers=2, **{**SIZES, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def student(mixers: Any, **more: Any) -> Any:
    torch.manual_seed(3)
    model = subquadratic(WORDS, mixers, num_hidden_layers=2, **{**SIZES, **more}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_steps(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence as it is defined, token by token."""
    state, found = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t].exp().unsqueeze(-1) * state + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        found.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("wide", [1, 3])
def test_matrix_chunks_and_steps_say_the_same(wide: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, d, dtype=torch.double) for d in (3, 3, 5))
    decay = -torch.rand(2, 3, 150, wide, dtype=torch.double) * 3
    wanted = by_steps(q, k, v, decay)
    assert torch.allclose(mixing_matrix(q, k, decay) @ v, wanted, atol=1e-12)
    out, state = scan(q, k, v, decay)
    assert torch.allclose(out, wanted, atol=1e-12)
    first, half = scan(q[:, :, :70], k[:, :, :70], v[:, :, :70], decay[:, :, :70])
    second, last = scan(q[:, :, 70:], k[:, :, 70:], v[:, :, 70:], decay[:, :, 70:], half)
    assert torch.allclose(torch.cat([first, second], dim=2), wanted, atol=1e-12)
    assert torch.allclose(last, state, atol=1e-12)


def test_without_decay_it_is_plain_causal_linear_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 90, 4)
    assert torch.allclose(scan(q, k, v)[0], mixing_matrix(q, k) @ v, atol=1e-4)
    assert torch.allclose(scan(q, k, v)[0], by_steps(q, k, v, torch.zeros(1, 2, 90, 1)), atol=1e-4)


def test_steep_decays_neither_overflow_nor_lose_their_gradient() -> None:
    q, k, v = torch.randn(3, 1, 1, 200, 4)
    decay = torch.full((1, 1, 200, 4), -50.0, requires_grad=True)
    matrix, out = mixing_matrix(q, k, decay), scan(q, k, v, decay)[0]
    (matrix.sum() + out.sum()).backward()
    assert all(torch.isfinite(t).all() for t in (matrix, out, decay.grad))
    assert torch.allclose(matrix, torch.diag_embed((q * k).sum(-1)), atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixers_matrix_is_what_it_does(name: str) -> None:
    """What comes out of the heads is matrix times values, on real tokens; padding changes nothing."""
    net, x = student(name), torch.randn(2, 70, 16, dtype=torch.double)
    mixer, rotary = net.model.layers[0].self_attn, net.model.rotary(torch.arange(70)[None])
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :9] = False
    out = mixer.mixed(x, rotary, mask)[0]
    there = mask[:, None, :, None].expand_as(out)
    found = mixer.matrix(x, rotary, mask) @ mixer.values(x, rotary, mask)
    assert torch.allclose(found[there], out[there], atol=1e-12)
    ids = torch.randint(2, WORDS, (2, 70))
    whole = net(ids, mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    alone = net(ids[:1, 9:]).logits
    assert torch.allclose(whole[:1, 9:], alone, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_it_writes_from_its_state_what_it_says_when_it_reads_everything(name: str) -> None:
    net, ids = student([name, "gla"]), torch.randint(2, WORDS, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, :3] = False
    found = write(net, ids, mask, Decoding(6, 0.0), ends=[], pad=0)
    for row, first in ((0, 3), (1, 0), (2, 0)):
        text = ids[row : row + 1, first:]
        for _ in range(6):
            text = torch.cat([text, net(text).logits[:, -1:].argmax(-1)], dim=1)
        assert found.ids[row].tolist() == text[0, -6:].tolist()
    beams = write(net, ids, mask, Decoding(5, 0.0, beams=3, keep=3), ends=[1], pad=0)
    assert beams.scores is not None
    assert bool((beams.scores.view(3, 3).diff(dim=1) <= 1e-9).all())  # told by whole passes, ordered by the search


def test_state_does_not_grow_where_no_layer_attends() -> None:
    net = student("gla")
    sizes = []
    for length in (10, 60):
        past = net(torch.randint(2, WORDS, (1, length)), use_cache=True).past_key_values
        sizes.append(sum(t.numel() for state in past.states for t in state))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Qwen2", {}), ("Llama", {"tie_word_embeddings": True})])
def test_the_teachers_attention_with_its_weights_is_the_teacher(kind: str, more: dict[str, Any]) -> None:
    judge, ids = teacher(kind, **more), torch.randint(2, WORDS, (2, 30))
    own = subquadratic_from(judge, "attention")
    assert torch.allclose(own(ids).logits, judge(ids).logits, atol=1e-5)


def test_scaled_positions_are_the_teachers() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    judge, ids = teacher(rope_parameters=scaling), torch.randint(2, WORDS, (2, 40))
    own = subquadratic_from(judge, "attention")
    assert torch.allclose(own(ids).logits, judge(ids).logits, atol=1e-5)
    halved = own.to(torch.bfloat16)
    assert halved.model.inv_freq.dtype == torch.float32


def test_copies_leave_all_but_mixers_as_the_teacher_has_it() -> None:
    judge = teacher()
    theirs = judge.state_dict()
    for copy, projections in (("all", True), ("rest", False)):
        own = subquadratic_from(judge, ["mamba2", "attention"], copy=copy).state_dict()
        for name, tensor in theirs.items():
            asked = ".layers.0.self_attn." not in name or projections
            assert torch.equal(own[name], tensor) == asked, name
    none = subquadratic_from(judge, "gla", copy="none").state_dict()
    assert not torch.equal(none["lm_head.weight"], theirs["lm_head.weight"])


def test_a_folder_gives_it_back(tmp_path: Any) -> None:
    judge, ids = teacher("Qwen2"), torch.randint(2, WORDS, (2, 12))
    own = subquadratic_from(judge, ["mlstm", "hedgehog"])
    options = {"vocabulary": WORDS, "mixers": ["mlstm", "hedgehog"], "num_hidden_layers": 2, "qkv_bias": True, **SIZES}
    save_student(own, tmp_path / "plain", model="limbeck.models.subquadratic:subquadratic", options=options)
    again = load_student(tmp_path / "plain").eval()
    assert torch.equal(again(ids).logits, own(ids).logits)
    own.save_pretrained(tmp_path / "hub")
    read = type(own).from_pretrained(tmp_path / "hub")
    assert torch.equal(read(ids).logits, own(ids).logits)
    half = type(own).from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    assert torch.equal(half.model.inv_freq, own.model.inv_freq)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mixers": "lineer"}, "linear"),
        ({"mixers": ["gla"]}, "by layer"),
        ({"hidden_sise": 3}, "hidden_size"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"head_dim": 3}, "even"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        subquadratic(WORDS, **{"num_hidden_layers": 2, **SIZES, **options})


def test_teachers_of_other_kinds_and_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="kind of Llama"):
        subquadratic_from(teacher("Gemma", head_dim=4))
    with pytest.raises(ModelError, match="no mixers"):
        copy_from(teacher(), teacher())
    with pytest.raises(ModelError, match="one shape"):
        copy_from(student("gla", intermediate_size=32), teacher())
    with pytest.raises(ConfigError, match="no such choice"):
        subquadratic_from(teacher(), copy="some")  # type: ignore[arg-type]
