from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from limbeck.cache.build import build
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, LimbeckError, TapError, TensorError
from limbeck.core.objective import Objective, Terms
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace
from limbeck.objectives.parts.divergences import Divergence
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.fused_kl import FusedKL
from limbeck.objectives.response.jsd import JSD
from limbeck.objectives.response.kd import KD
from limbeck.objectives.response.reverse_kl import ReverseKL
from limbeck.objectives.response.skew_kl import SkewKL
from limbeck.objectives.response.top_k_kl import TopKKL
from limbeck.objectives.response.total_variation import TotalVariation
from limbeck.teachers.cached import CachedTeacher
from tests.cache.conftest import FULL, make_loader, make_teacher

VOCABULARY, WIDTH, LENGTH = 61, 16, 7
DENSE: dict[Divergence, Callable[[float], Objective]] = {
    "forward_kl": lambda t: KD(temperature=t),
    "reverse_kl": lambda t: ReverseKL(temperature=t),
    "jsd": lambda t: JSD(beta=0.3, temperature=t),
    "skew_kl": lambda t: SkewKL(skew=0.2, temperature=t),
    "skew_reverse_kl": lambda t: SkewKL(skew=0.2, reverse=True, temperature=t),
    "total_variation": lambda t: TotalVariation(),
}


def llama(seed: int, width: int = WIDTH, vocabulary: int = VOCABULARY, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config).double()


def make_batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    mask = torch.rand(size, LENGTH, generator=generator) < 0.7
    labels = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator).masked_fill(~mask, -1)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, torch.arange(size), mask)


def result(student: nn.Module, loss: Objective | Terms, teacher: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    student.zero_grad()
    distiller = Distiller(student, loss, teacher).setup(batch)
    total = distiller(batch).total
    total.backward()
    distiller.close()
    return total.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


class FromLogits:
    """A teacher that tells the first k of a model's logits, as a cache does."""

    def __init__(self, model: nn.Module, k: int) -> None:
        self.model, self.k = model, k

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        self.taps = taps

    def __call__(self, batch: Batch) -> Trace:
        with torch.no_grad():
            return Trace(None, {"top_k": TopK.of(self.model(**batch.inputs).logits, self.k)})

    def to(self, device: object) -> FromLogits:
        return self


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_equals_the_losses_on_logits(divergence: Divergence, tied: bool) -> None:
    """Value and gradient of every parameter of two language models, in float64, head and embedding included."""
    student, teacher = llama(0, tie_word_embeddings=tied), llama(1, 24)
    batch, temperature = make_batch(), 1.0 if divergence == "total_variation" else 2.0
    fused = FusedKL(divergence, label_share=0.25, beta=0.3, skew=0.2, temperature=temperature, chunk=5)
    wanted = result(student, 0.25 * CrossEntropy() + 0.75 * DENSE[divergence](temperature), teacher, batch)
    found = result(student, fused, teacher, batch)
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("temperature", "label_share"), [(1.0, 0.25), (2.0, 0.0)])
def test_from_a_record_it_equals_the_loss_over_k_classes(temperature: float, label_share: float) -> None:
    student, teacher, batch = llama(0), FromLogits(llama(1, 24), 5), make_batch()
    dense = (1 - label_share) * TopKKL(source="top_k", temperature=temperature)
    wanted = result(student, label_share * CrossEntropy() + dense, teacher, batch)
    loss = FusedKL(teacher="top_k", temperature=temperature, label_share=label_share)
    found = result(student, loss, teacher, batch)
    torch.testing.assert_close(found[0], wanted[0])
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("teacher", ["top_k", "head"])
def test_from_a_cache(teacher: str, tmp_path: Path) -> None:
    """Of sparse predictions; and of hidden states with their head."""
    live, loader = make_teacher(), make_loader(augment=(), batch_size=20)
    stored: dict[str, Any] = {"logits": {"top_k": {"k": 4, "bits": 12}}, **dict.fromkeys(FusedKL.student_taps, FULL)}
    build(live, loader, tmp_path, store=stored, batch=16)
    student, batch = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loader.example(20)
    loss: Objective = FusedKL(teacher=teacher, label_share=0.0)
    found = result(student, loss, CachedTeacher(tmp_path), batch)[0]
    wanted = result(student, TopKKL(k=4) if teacher == "top_k" else KD(temperature=1.0), live, batch)[0]
    torch.testing.assert_close(found, wanted, rtol=2e-3 if teacher == "top_k" else 1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@contextmanager
def heads_seen(*models: nn.Module) -> Iterator[list[str]]:
    ran: list[str] = []
    handles = [m.get_submodule("lm_head").register_forward_hook(lambda *_: ran.append("ran")) for m in models]
    yield ran
    for handle in handles:
        handle.remove()


def test_no_logits_of_all_tokens_are_made_by_either_model() -> None:
    """In forward and backward, with a vocabulary so large that such a tensor would be the largest of all."""
    vocabulary, batch = 3000, make_batch(8)
    student, teacher = llama(0, vocabulary=vocabulary), llama(1, vocabulary=vocabulary)
    tokens = batch.inputs["input_ids"].numel()
    sizes = {}
    for loss in (FusedKL(chunk=4), 0.5 * CrossEntropy() + 0.5 * KD(temperature=1.0)):
        distiller = Distiller(student, loss, teacher).setup(batch)
        with heads_seen(student, teacher) as ran, Largest() as seen:
            distiller(batch).total.backward()
        sizes[isinstance(loss, FusedKL)] = seen.numel, len(ran)
        distiller.close()
    assert sizes[False] == (tokens * vocabulary, 2)  # the measure sees them where they are made
    assert sizes[True][1] == 0
    assert sizes[True][0] == vocabulary * WIDTH < tokens * vocabulary  # the head itself is the largest


def test_parts_add_up_and_are_told_apart() -> None:
    student, teacher, batch = llama(0), llama(1), make_batch()
    losses = Distiller(student, FusedKL(label_share=0.25), teacher).setup(batch)(batch)
    apart = Distiller(student, 0.25 * CrossEntropy() + 0.75 * KD(temperature=1.0), teacher).setup(batch)(batch)
    torch.testing.assert_close(losses.terms["fused_kl/cross_entropy"], 0.25 * apart.terms["cross_entropy"])
    torch.testing.assert_close(losses.terms["fused_kl/divergence"], 0.75 * apart.terms["kd"])


def test_a_place_without_a_label_counts_only_where_labels_have_no_share() -> None:
    student, teacher, batch = llama(0), llama(1), make_batch()
    labels = batch.require("labels").clone()
    labels[0] = -1
    fewer = batch.replace(labels=labels)
    narrower = batch.replace(mask=batch.require("mask") & (labels >= 0))
    wanted = result(student, 0.5 * CrossEntropy() + 0.5 * KD(temperature=1.0), teacher, narrower)[0]
    torch.testing.assert_close(result(student, FusedKL(), teacher, fewer)[0], wanted)
    wanted = result(student, KD(temperature=1.0), teacher, fewer)[0]
    alone = fewer.replace(labels=None)
    torch.testing.assert_close(result(student, FusedKL(label_share=0.0), teacher, alone)[0], wanted)
    with pytest.raises(LimbeckError, match="labels"):
        result(student, FusedKL(), teacher, alone)


def test_vocabularies_padded_to_different_sizes() -> None:
    """What lies beyond the smaller one is as if it were ruled out by both."""
    student, teacher, batch = llama(0), llama(1, vocabulary=VOCABULARY + 6), make_batch()
    said = [Trace(model(**batch.inputs).logits.detach()[..., :VOCABULARY]) for model in (student, teacher)]
    wanted = 0.5 * CrossEntropy()(*said, batch) + 0.5 * KD(temperature=1.0)(*said, batch)
    torch.testing.assert_close(result(student, FusedKL(), teacher, batch)[0], wanted.detach())


@pytest.mark.parametrize(
    ("config", "model"),
    [(CohereConfig(logit_scale=0.1), CohereForCausalLM), (GraniteConfig(logits_scaling=3.0), GraniteForCausalLM)],
)
def test_a_model_that_scales_its_logits_is_refused(config: Any, model: Any) -> None:
    config.update({"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0})
    other, batch = model(config).double(), make_batch()
    for student, teacher in ((other, llama(1)), (llama(0), other)):
        with pytest.raises(TapError, match=r"logits@in: this model's logits are not.*lm_head"):
            Distiller(student, FusedKL(), teacher).setup(batch)


def test_a_model_that_chooses_among_its_outputs_is_refused() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
    batch = make_batch().replace(mask=None, labels=torch.zeros(4, dtype=torch.long))
    pooled = GPT2ForSequenceClassification(config)
    with pytest.raises(TapError, match="score"):
        Distiller(pooled, FusedKL(), GPT2LMHeadModel(config)).setup(batch)


def test_other_lengths_are_refused() -> None:
    batch = make_batch()
    shorter = {name: value[:, :-1] for name, value in batch.inputs.items()}
    with pytest.raises(TensorError, match="teacher_hidden"):
        result(llama(0), FusedKL(), llama(1), batch.replace(teacher_inputs=shorter))


def test_what_it_refuses() -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"divergence": "kl"}, "divergence"),
        ({"label_share": 1.5}, "label_share"),
        ({"temperature": 0.0}, "temperature"),
        ({"teacher": "logits"}, "teacher"),
        ({"chunk": 0}, "chunk"),
    ]
    for wrong, match in options:
        with pytest.raises(ConfigError, match=match):
            FusedKL(**wrong)
