"""Texts written by tiny models: what is drawn, by what chance, and what stays as it was."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.taps import Listener
from limbeck.data.language.tokens import ByteTokens
from limbeck.models.drawing import mixture, row_keys
from limbeck.models.generating import Completions, Decoding, endings, write

END, PAD, V = 1, 0, 7


def llama(seed: int = 0, vocabulary: int = V, sharp: float = 12.0, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **marks, **options)
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data *= sharp
    return model.double()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, 0, 5, 3], [2, 4, 6, 5], [0, 3, 3, 2]])
    return ids, torch.tensor([[False, False, True, True], [True] * 4, [False, True, True, True]])


def written(model: Any, ids: Tensor, mask: Tensor, decoding: Decoding, **more: Any) -> Completions:
    return write(model, ids, mask, decoding, ends=[END], pad=PAD, **more)


def chances(model: Any, prefix: list[int], temperature: float = 1.0) -> Tensor:
    """The distribution of the next token, by one plain forward of one unpadded text."""
    with torch.no_grad():
        return (model(torch.tensor([prefix])).logits[0, -1] / temperature).softmax(-1)


def text(found: Completions, row: int) -> list[int]:
    return found.ids[row, : int(found.lengths[row])].tolist()


def test_the_likeliest_tokens_are_those_of_plain_forwards(model: Any) -> None:
    ids, mask = prompts()
    found = written(model, ids, mask, Decoding(9, temperature=0.0))
    for row in range(3):
        prefix = ids[row][mask[row]].tolist()
        wanted: list[int] = []
        while len(wanted) < 9 and END not in wanted:
            wanted.append(int(chances(model, prefix + wanted).argmax()))
        assert text(found, row) == wanted
        assert bool(found.finished[row]) == (END in wanted)
        assert (found.ids[row, len(wanted) :] == PAD).all()
    assert found.log_probs is None
    assert found.scores is None


def test_draws_have_the_chances_they_should(model: Any) -> None:
    """Over many keys, whole texts come as often as the model says; log-probabilities are those of plain forwards."""
    rows, temperature = 4000, 1.5
    ids, mask = torch.tensor([[5, 3]]).expand(rows, 2), torch.ones(rows, 2, dtype=torch.bool)
    decoding = Decoding(2, temperature=temperature)
    found = written(model, ids, mask, decoding, keys=row_keys(torch.arange(rows), 8))
    counts: dict[tuple[int, ...], int] = {}
    for row in range(rows):
        counts[tuple(text(found, row))] = counts.get(tuple(text(found, row)), 0) + 1
    assert found.log_probs is not None
    square, free = 0.0, 0
    for first in range(V):
        once = chances(model, [5, 3], temperature)[first]
        for second in [None] if first == END else range(V):
            also = 1.0 if second is None else float(chances(model, [5, 3, first], temperature)[second])
            wanted = rows * float(once) * also
            said = (first,) if second is None else (first, second)
            if wanted > 5:
                square += (counts.get(said, 0) - wanted) ** 2 / wanted
                free += 1
            row = next((r for r in range(rows) if tuple(text(found, r)) == said), None)
            if row is not None:
                assert math.isclose(float(found.log_probs[row].sum()), math.log(float(once) * also), rel_tol=1e-6)
    assert free > 8
    assert square < free + 4 * math.sqrt(2 * free)  # chi-square


def test_what_is_drawn_does_not_depend_on_the_rest_of_the_batch(model: Any) -> None:
    ids, mask = prompts()
    keys, decoding = row_keys(torch.tensor([11, 12, 13]), 3), Decoding(12, top_k=5, top_p=0.95)
    whole = written(model, ids, mask, decoding, keys=keys)
    for row in range(3):
        alone = written(model, ids[row : row + 1], mask[row : row + 1], decoding, keys=keys[row : row + 1])
        assert text(alone, 0) == text(whole, row)
    again = written(model, ids, mask, decoding, keys=row_keys(torch.tensor([11, 12, 13]), 4))
    assert not torch.equal(again.ids, whole.ids[:, : again.ids.shape[1]])
    assert (whole.ids == whole.ids.clamp(max=V - 1)).all()


def test_only_the_likeliest_are_drawn_from(model: Any) -> None:
    ids, mask = torch.tensor([[5, 3]]).expand(200, 2), torch.ones(200, 2, dtype=torch.bool)
    for decoding, allowed in (
        (Decoding(1, top_k=2), chances(model, [5, 3]).topk(2).indices.tolist()),
        (Decoding(1, top_p=1e-6), [int(chances(model, [5, 3]).argmax())]),
    ):
        found = written(model, ids, mask, decoding, keys=row_keys(torch.arange(200), 0))
        assert set(found.ids[:, 0].tolist()) == set(allowed)


def test_two_models_are_mixed_token_by_token(model: Any) -> None:
    """Each row's log-probability is the mixture's, from plain forwards of both models."""
    teacher, share, temperature = llama(5, vocabulary=V + 2), 0.3, 2.0
    ids, mask = prompts()
    decoding = Decoding(6, temperature=temperature)
    found = written(model, ids, mask, decoding, keys=row_keys(torch.arange(3), 1), mixed=teacher, share=share)
    assert found.log_probs is not None
    for row in range(3):
        prefix = ids[row][mask[row]].tolist()
        for place, token in enumerate(text(found, row)):
            said = text(found, row)[:place]
            with torch.no_grad():
                logits = teacher(torch.tensor([prefix + said])).logits[0, -1, :V]
            other = (logits / temperature).softmax(-1)
            wanted = (1 - share) * chances(model, prefix + said, temperature)[token] + share * other[token]
            assert math.isclose(float(found.log_probs[row, place]), math.log(float(wanted)), abs_tol=1e-6)
    assert torch.allclose(mixture(torch.zeros(3), torch.zeros(3), 1.0).exp(), torch.full((3,), 1 / 3))


def test_beams_find_the_likeliest_texts() -> None:
    """With enough beams the kept ones are the best of all texts, with their log-probabilities."""
    model, most = llama(2, vocabulary=4, sharp=6.0), 3
    wanted: dict[tuple[int, ...], float] = {}
    for said in itertools.chain.from_iterable(itertools.product(range(4), repeat=n) for n in range(1, most + 1)):
        ended = said[-1] == END or len(said) == most
        if ended and END not in said[:-1]:
            wanted[said] = sum(math.log(float(chances(model, [2, 3, *said[:i]])[t])) for i, t in enumerate(said))
    best = sorted(wanted, key=lambda said: -wanted[said])
    found = written(model, torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.bool), Decoding(most, beams=30, keep=4))
    assert found.scores is not None
    assert [tuple(text(found, row)) for row in range(4)] == best[:4]
    for row in range(4):
        assert math.isclose(float(found.scores[row]), wanted[best[row]], rel_tol=1e-5)
        assert bool(found.finished[row]) == (best[row][-1] == END)


def test_nothing_is_left_behind() -> None:
    """Modes, random state, hooks of a listener and weights are as before; dropout is off meanwhile."""
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    ids, mask = prompts()
    listener = Listener(model, ["model.layers.1.mlp", "logits"], {"input_ids": ids[1:2]})
    before = listener({"input_ids": ids[1:2], "use_cache": False})["model.layers.1.mlp"].shape
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    keys = row_keys(torch.arange(3), 2)
    first, second = (written(model, ids, mask, Decoding(8), keys=keys) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert listener({"input_ids": ids[1:2], "use_cache": False})["model.layers.1.mlp"].shape == before
    assert all(p.grad is None for p in model.parameters())
    listener.close()
    torch.manual_seed(1)
    drawn = [written(model, ids, mask, Decoding(8)).ids for _ in range(2)]  # no keys: from torch's random state
    torch.manual_seed(1)
    assert torch.equal(written(model, ids, mask, Decoding(8)).ids, drawn[0])
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


class Plain(nn.Module):
    """A model that knows nothing of transformers."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(input_ids, V).float()


def test_refusals(model: Any) -> None:
    ids, mask = prompts()
    with pytest.raises(ModelError, match=r"student: this model does not write texts; found Plain; wanted a causal"):
        written(Plain(), ids, mask, Decoding(), where="student")
    with pytest.raises(ModelError, match=r"no positions for such long texts; found 64.*wanted 66: prompts of 4 and 62"):
        written(model, ids, mask, Decoding(62))
    with pytest.raises(ConfigError, match="only what is drawn can be drawn from two models"):
        written(model, ids, mask, Decoding(8, temperature=0.0), mixed=model, share=0.5)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"beams": 2, "keep": 3}, {"top_k": -1}):
        with pytest.raises(ConfigError):
            Decoding(**wrong)


def test_a_models_own_settings_change_nothing(model: Any) -> None:
    ids, mask = prompts()
    keys = row_keys(torch.arange(3), 2)
    wanted = written(model, ids, mask, Decoding(8), keys=keys)
    other = llama()
    other.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=9.0, max_length=5, do_sample=True)
    assert torch.equal(written(other, ids, mask, Decoding(8), keys=keys).ids, wanted.ids)


def test_what_ends_a_text(model: Any) -> None:
    assert endings(ByteTokens(), model) == [1]

    class Chat:
        eos = 3
        specials = ("<|im_end|>",)

        def table(self) -> dict[str, int]:
            return {"<|im_end|>": 9, "a": 8}

    other = llama()
    other.generation_config.eos_token_id = [8, 9]
    assert endings(Chat(), other) == [3, 9]
