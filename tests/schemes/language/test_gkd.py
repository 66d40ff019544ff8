"""On-policy distillation: who writes, what is learned of it, and that nothing else has a part in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import load_source
from limbeck.data.language import train_bpe
from limbeck.objectives import JSD, KD, CrossEntropy, ReverseKL
from limbeck.recipes.distill import distill
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.gkd import GKD, OnPolicy
from tests.schemes.tiny import cast, llama, records, weights

LOSS = {"max_new_tokens": 8}


def distiller(scene: Cast, **options: Any) -> OnPolicy:
    (training,) = GKD(**{**LOSS, **options}).trainings(scene)
    found = training.stages[0].distiller
    assert isinstance(found, OnPolicy)
    return found


def step(batch: Batch, number: int = 0) -> Batch:
    return batch.replace(progress=torch.tensor(number / 100))


def test_without_lambda_it_is_plain_distillation() -> None:
    loss = CrossEntropy() + JSD()
    first, second = (perform(s, cast(loss), quiet=True) for s in (GKD(lmbda=0.0, **LOSS), Offline()))
    assert torch.equal(weights(first.student), weights(second.student))


def test_a_step_is_the_divergence_over_texts_that_the_student_draws() -> None:
    """The loss and its gradient, by plain loops over the texts that were written, one unpadded text at a time."""
    scene = cast(JSD(beta=0.3))
    made, batch = distiller(scene, lmbda=1.0), step(scene.train.example(6))
    made.setup(batch)
    written = made.made(batch)
    losses = made(written)
    losses.total.backward()
    found = torch.cat([p.grad.flatten() for p in scene.student.parameters()])
    student, total, count = scene.student, 0.0, 0
    student.zero_grad()
    read = batch.inputs["input_ids"]
    for row in range(6):
        prompt = read[row, : int(batch.mask[row].int().argmax()) + 1].tolist()
        size = int(written.inputs["attention_mask"][row].sum())
        ids = written.inputs["input_ids"][row, :size]
        assert ids[: len(prompt)].tolist() == prompt
        said = ids[len(prompt) :].tolist()
        assert said.index(1) == len(said) - 1 if 1 in said else len(said) == 8
        for place in range(len(prompt), size):
            own = student(ids[None, :place]).logits[0, -1].softmax(-1)
            other = scene.teacher.model(ids[None, :place]).logits[0, -1].softmax(-1).detach()
            mixed = 0.3 * other + 0.7 * own
            divergence = 0.3 * (other * (other / mixed).log()).sum() + 0.7 * (own * (own / mixed).log()).sum()
            total, count = total + divergence, count + 1
    assert count == int(written.mask.sum())
    (total / count).backward()
    torch.testing.assert_close(losses.total, total / count)
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in student.parameters()]))


def test_it_is_the_student_itself_that_writes() -> None:
    """Greedy texts of student and teacher are those of plain forwards of the one and of the other."""
    scene = cast(KD())
    batch = step(scene.train.example(3))
    for options, model in (
        ({"lmbda": 1.0}, scene.student),
        ({"lmbda": 0.0, "teacher_share": 1.0}, scene.teacher.model),
    ):
        made = distiller(scene, temperature=0.0, **options).made(batch)
        for row in range(3):
            ids = batch.inputs["input_ids"][row, : int(batch.mask[row].int().argmax()) + 1].tolist()
            first = len(ids)
            while len(ids) < first + 8 and 1 not in ids[first:]:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert made.inputs["input_ids"][row, : len(ids)].tolist() == ids
            assert made.mask[row].nonzero().flatten().tolist() == list(range(first - 1, len(ids) - 1))


def test_how_often_who_writes() -> None:
    made = distiller(cast(KD()), lmbda=0.3, teacher_share=0.5)
    keys = [made.step_key(step(Batch(None, index=torch.zeros(1)), number)) for number in range(3000)]
    assert len(set(keys)) == 3000
    authors = [made.author(k) for k in keys]
    for author, share in (("student", 0.3), ("teacher", 0.35), ("data", 0.35)):
        assert abs(authors.count(author) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    alone = [made.step_key(Batch(None)) for _ in range(2)]  # outside of the engine
    assert alone[0] != alone[1]


def test_labels_have_no_say_in_what_the_student_wrote() -> None:
    """Cross-entropy on its own words would only tell it that they were right."""
    scene = cast(CrossEntropy() + KD())
    for options, labelled in (({"lmbda": 1.0}, False), ({"lmbda": 0.0, "teacher_share": 1.0}, True)):
        made = distiller(scene, **options)
        batch = step(scene.train.example(4))
        made.setup(batch)
        found = made(made.made(batch)).terms["cross_entropy"]
        assert bool(found > 0) == labelled
        assert float(made(made.made(batch)).terms["kd"]) > 0
        made.close()


def test_equal_models_have_nothing_to_learn() -> None:
    model = llama(seed=4)
    scene = cast(ReverseKL(), teacher=FrozenTeacher(llama(seed=4)))
    scene.student = model
    made, batch = distiller(scene, lmbda=1.0), step(scene.train.example(4))
    made.setup(batch)
    assert float(made(made.made(batch)).total.detach()) < 1e-6


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_change_nothing(accumulate: int) -> None:
    """Each text follows from its sample and step, and the loss is a mean over all tokens of the step."""
    options = {"lmbda": 0.6, "teacher_share": 0.5, **LOSS}
    whole = perform(GKD(**options), cast(JSD()), quiet=True)
    parts = perform(GKD(**options), cast(JSD(), config={"accumulate": accumulate}), quiet=True)
    plain = perform(Offline(), cast(JSD()), quiet=True)
    # Shares of a step are numbers of single precision.
    torch.testing.assert_close(weights(parts.student), weights(whole.student), atol=1e-7, rtol=0)
    assert (weights(plain.student) - weights(whole.student)).abs().max() > 1e-4


def test_padding_side_changes_nothing() -> None:
    right, left = (
        perform(GKD(lmbda=1.0, **LOSS), cast(JSD(), options={"padding": side}), quiet=True)
        for side in ("right", "left")
    )
    torch.testing.assert_close(weights(left.student), weights(right.student), atol=1e-9, rtol=0)


def test_in_python(tmp_path: Any) -> None:
    """From lists of texts, with a loss of one's own; whole texts are gone on with from their first tokens."""
    texts = [r["prompt"] + r["completion"] for r in records()]
    options = {"lmbda": 1.0, "prompt": 4, **LOSS}
    data = load_source(texts, tokenizer="bytes", length=32)
    train: dict[str, Any] = {"steps": 2, "optimizer": "adamw", "lr": 1e-3, "batch_size": 8, "quiet": True}
    student = llama(seed=1)
    done = distill(
        llama(width=24, seed=2), student, data, ReverseKL(), scheme="gkd", scheme_options=options, out=tmp_path, **train
    )
    assert done.steps == 2
    assert done.result["perplexity"] > 1
    assert not student._forward_hooks
    assert not any(m._forward_hooks for m in student.modules())


class Mute(nn.Module):
    """A model of texts that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(258, 258)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.embedding(input_ids)


def refused(scene: Cast, **options: Any) -> None:
    next(iter(GKD(**{**LOSS, **options}).trainings(scene)))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="teacher: on-policy distillation asks a teacher; found none"):
        refused(cast(CrossEntropy(), teacher=None))
    with pytest.raises(ConfigError, match="loss: nothing in this loss asks the teacher"):
        refused(cast(CrossEntropy()))
    with pytest.raises(DataError, match="data.options.pack: a pack holds several texts"):
        refused(cast(KD(), options={"pack": True}))
    scene = cast(KD())
    scene.student = Mute()
    with pytest.raises(ModelError, match="student: this model does not write texts; found Mute"):
        refused(scene)
    scene = cast(KD(), teacher=FrozenTeacher(Mute()))
    with pytest.raises(ModelError, match="teacher: this model does not write texts; found Mute"):
        refused(scene)
    with pytest.raises(DataError, match="their tokenizers differ; found bytes and bpe of 262.*use seq_kd"):
        refused(cast(KD(), options={"teacher_tokenizer": train_bpe(["to be or not to be"] * 9, 262)}))
    with pytest.raises(ConfigError, match="scheme.lmbda"):
        GKD(lmbda=1.5)
    scene = cast(KD())
    scene.train = None
    with pytest.raises(DataError, match="texts are written here, and these data are none"):
        refused(scene)
