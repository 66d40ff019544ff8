"""An encoder-decoder that learns from a decoder: places, passes, masks, and texts of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.pairs import seq2seq_source, side_by_side
from limbeck.engine.evaluation import evaluate
from limbeck.models.answering import answer
from limbeck.models.generating import Decoding
from limbeck.objectives import AT, KD, CrossEntropy
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.mu_encdec_kd import AlignedTeacher, MuDistiller, MuEncDecKD, aligned_logits
from tests.schemes.asked import asked, t5
from tests.schemes.tiny import cast, llama, weights

LOSS = CrossEntropy() + KD(temperature=1.0)


def scene(loss: Any = None, options: dict[str, Any] | None = None, **changes: Any) -> Cast:
    data = asked(validation=0, **options or {}).train
    given = cast(LOSS if loss is None else loss, data=data, **changes)
    given.student = t5().double()
    return given


def distiller(given: Cast, **options: Any) -> MuDistiller:
    (training,) = MuEncDecKD(**{"max_new_tokens": 6, **options}).trainings(given)
    found = training.stages[0].distiller
    assert isinstance(found, MuDistiller)
    return found


def test_the_teachers_places_are_those_that_predict_the_same_tokens() -> None:
    """A teacher whose logits at place p say p: the slice is S - 1 to S + T - 2."""
    for length, count in ((4, 3), (1, 5), (7, 1)):
        said = torch.arange(float(length + count)).view(1, -1, 1).expand(2, -1, 3)
        wanted = torch.arange(length - 1, length + count - 1).tolist()
        assert aligned_logits(said, count)[0, :, 0].tolist() == wanted


def test_a_batch_holds_the_same_texts_twice() -> None:
    given = scene()
    batch, judge = given.train.example(9), given.teacher
    aligned = AlignedTeacher(judge.model)  # type: ignore[union-attr]
    aligned.attach(("logits",), batch)
    logits = aligned(batch).logits
    for row in range(9):
        inputs = batch.inputs
        source = inputs["input_ids"][row][inputs["attention_mask"][row] > 0]
        target = batch.labels[row][batch.mask[row]]
        whole = torch.cat([source, target])[None]
        alone = judge.model(whole).logits[0, len(source) - 1 : -1]  # type: ignore[union-attr]
        assert torch.allclose(logits[row][batch.mask[row]], alone, atol=1e-9)
        assert inputs["decoder_input_ids"][row, 0] == 1
        assert inputs["decoder_input_ids"][row, 1 : len(target)].tolist() == target[:-1].tolist()
        assert torch.equal(batch.extras["teacher_labels"][row][batch.extras["teacher_mask"][row]], target)


def test_both_passes_are_what_they_are_said_to_be() -> None:
    """On texts of its own by the teacher, on the data by labels; each the mean over its own tokens."""
    given = scene()
    made = distiller(given, alpha=0.7)
    batch = given.train.example(6).replace(progress=torch.tensor(0.5))
    made.setup(batch)
    step = made.made(batch)
    own: Batch = step.extras["own"]
    losses = made(step)
    student, judge = given.student, given.teacher.model  # type: ignore[union-attr]
    ce = student(**batch.inputs).logits.log_softmax(-1)[batch.mask]
    wanted_ce = -ce.gather(1, batch.labels[batch.mask][:, None]).mean()
    rows = []
    for row in range(6):
        source = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row] > 0]
        written = own.teacher_inputs["input_ids"][row][-own.mask.shape[1] :][own.mask[row]]
        theirs = judge(torch.cat([source, written])[None]).logits[0, len(source) - 1 : -1].log_softmax(-1)
        begun = torch.cat([torch.ones(1, dtype=torch.long), written[:-1]])
        ours = student(input_ids=source[None], decoder_input_ids=begun[None]).logits[0].log_softmax(-1)
        rows.append((theirs.exp() * (theirs - ours)).sum(-1))
    wanted = 0.7 * torch.cat(rows).mean() + 0.3 * wanted_ce
    assert torch.allclose(losses.total, wanted, rtol=1e-6)
    assert not torch.equal(own.inputs["decoder_input_ids"], batch.inputs["decoder_input_ids"])


def test_alpha_nothing_is_plain_training_and_off_policy_is_the_datas_texts() -> None:
    plain = perform(Offline(), scene(CrossEntropy(), teacher=None), quiet=True).student
    none = perform(MuEncDecKD(alpha=0.0), scene(), quiet=True).student
    assert torch.equal(weights(plain), weights(none))
    given = scene()
    made, batch = distiller(given, on_policy=False, alpha=0.5), given.train.example(6)
    losses = made.setup(batch)(made.made(batch))
    ours = given.student(**batch.inputs).logits
    aligned = AlignedTeacher(given.teacher.model)  # type: ignore[union-attr]
    aligned.attach(("logits",), batch)
    theirs = aligned(batch).logits.log_softmax(-1)[batch.mask]
    kd = (theirs.exp() * (theirs - ours.log_softmax(-1)[batch.mask])).sum(-1).mean()
    assert torch.allclose(losses.terms["kd"], kd)
    assert torch.allclose(losses.total, 0.5 * losses.terms["kd"] + 0.5 * losses.terms["cross_entropy"])


def test_at_the_teachers_logits_nothing_is_lost_and_padding_and_spare_ids_change_nothing() -> None:
    torch.manual_seed(0)
    source, target = torch.tensor([[5, 6, 7], [5, 0, 0]]), torch.tensor([[8, 9, 3], [8, 0, 0]])
    batch = side_by_side(source, source > 0, target, target > 0, start=1)
    said, ours = torch.randn(2, 6, 12, dtype=torch.double), torch.randn(2, 3, 12, dtype=torch.double)

    def loss(student: Tensor, teacher: Tensor, batch: Batch) -> float:
        own = Said(student), AlignedTeacher(Said(teacher))
        made = MuDistiller(own[0], CrossEntropy() + KD(temperature=1.0), own[1])
        made.apart(1.0)
        return made.setup(batch)(batch).total.item()

    assert abs(loss(aligned_logits(said, 3), said, batch)) < 1e-12
    plain = loss(ours, said, batch)
    assert plain > 0.1
    wide = torch.cat([ours, torch.randn(2, 3, 4)], dim=-1)
    assert loss(wide, said, batch) == pytest.approx(plain, rel=1e-12)
    wide = torch.cat([said, torch.randn(2, 6, 4)], dim=-1)
    assert loss(ours, wide, batch) == pytest.approx(plain, rel=1e-12)
    longer = torch.nn.functional.pad(target, (0, 2))
    padded = side_by_side(source, source > 0, longer, longer > 0, start=1)
    more = torch.randn(2, 2, 12)
    assert loss(torch.cat([ours, more], 1), torch.cat([said, more], 1), padded) == pytest.approx(plain, rel=1e-12)


class Said(nn.Module):
    """A model that says what it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.double())

    def forward(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.slow
@pytest.mark.parametrize("mask_padding", [True, False])
def test_micro_batches_change_nothing(mask_padding: bool) -> None:
    options = {"max_new_tokens": 5, "mask_padding": mask_padding}
    whole, parts = (perform(MuEncDecKD(**options), scene(config={"accumulate": n}), quiet=True).student for n in (1, 3))
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)


def test_without_the_mask_padding_is_learned_too() -> None:
    given = scene()
    made, batch = distiller(given, mask_padding=False, max_new_tokens=40), given.train.example(6)
    own = made.answered(batch.replace(progress=torch.tensor(0.5)))
    assert own.mask.shape == (6, 40)
    assert bool(own.mask.all())


def test_what_is_written_follows_from_its_row_alone_and_greedy_is_the_likeliest() -> None:
    model = t5().double()
    ids, keys = torch.tensor([[5, 9, 7], [8, 6, 0], [4, 4, 4]]), torch.tensor([3, 4, 5])
    options: dict[str, Any] = {"start": 1, "ends": [2], "pad": 0}
    whole = answer(model, ids, ids > 0, Decoding(8), keys=keys, **options)
    alone = answer(model, ids[1:2, :2], ids[1:2, :2] > 0, Decoding(8), keys=keys[1:2], **options)
    assert whole.ids[1, : len(alone.ids[0])].tolist() == alone.ids[0].tolist()
    greedy = answer(model, ids[:1], ids[:1] > 0, Decoding(5, 0.0), **options).ids[0]
    text = torch.tensor([[1]])
    for _ in range(5):
        text = torch.cat([text, model(input_ids=ids[:1], decoder_input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert greedy.tolist() == text[0, 1:].tolist()
    few = answer(model, ids, ids > 0, Decoding(30), keys=keys, size=40, **options)
    assert int(few.ids.max()) < 40


def test_long_sources_and_targets_are_cut() -> None:
    batch = scene(options={"source_length": 3, "target_length": 2}).train.example(30)
    assert batch.inputs["input_ids"].shape[1] == 3
    assert batch.labels.shape[1] == 2
    few = asked(validation=0).train.subset(torch.tensor([3, 1]))
    assert torch.equal(few.rows.batch(torch.tensor([0])).labels, LanguageLoader(few, batch_size=2).example(1).labels)


@pytest.mark.slow
def test_the_teacher_helps_more_than_labels_alone() -> None:
    """Letters are to be copied, and half of the labels are wrong: with a teacher that knows, loss is lower."""
    generator = torch.Generator().manual_seed(0)
    letters, others = torch.randint(6, (2, 160), generator=generator).tolist()
    wrong = (torch.rand(160, generator=generator) < 0.5).tolist()
    given = zip(letters, others, wrong, strict=True)
    train = [{"prompt": "abcdef"[i], "completion": "abcdef"[j if bad else i]} for i, j, bad in given]
    held = [{"prompt": letter, "completion": letter} for letter in "abcdef"]
    source = seq2seq_source({"train": train, "validation": held}, tokenizer="bytes")
    found = {}
    for alpha in (0.0, 0.9):
        settings = {"optimizer": "adamw", "lr": 0.03}
        with_teacher = FrozenTeacher(Copier().double())
        scene = cast(LOSS, data=source.train, batch_size=40, steps=60, teacher=with_teacher, config=settings)
        scene.student = t5(width=32)
        perform(MuEncDecKD(alpha, on_policy=False), scene, quiet=True)
        found[alpha] = evaluate(scene.student, LanguageLoader(source.validation, batch_size=6))["nll"]
    assert found[0.9] < found[0.0]


class Copier(nn.Module):
    """Knows the task: what stands behind the first mark comes once more, and then the end."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(12.0))
        self.config, self.generate = SimpleNamespace(is_encoder_decoder=False), llama

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        said = torch.ones_like(input_ids)
        said[:, :2] = input_ids[:, 1:2]
        return SimpleNamespace(logits=self.scale * torch.nn.functional.one_hot(said, 258).to(self.scale.dtype))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ModelError, match="encoder"):
        distiller(cast(LOSS))
    plain = cast(LOSS)
    plain.student = t5()
    with pytest.raises(DataError, match="seq2seq_source"):
        distiller(plain)
    given = scene()
    given.student.config.decoder_start_token_id = 7
    with pytest.raises(DataError, match="start: 7"):
        distiller(given)
    with pytest.raises(ConfigError, match="only logits"):
        distiller(scene(KD() + AT()))
    with pytest.raises(ConfigError, match="pack"):
        asked(pack=True, length=32)
    with pytest.raises(ConfigError, match="target_length"):
        asked(target_length=0)
