"""SenseDict: what is gathered, which sense is learned, and what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.build import as_loader
from limbeck.data.language import LanguageLoader
from limbeck.engine import TrainConfig
from limbeck.models.senses import SenseDictionary, SenseStudent
from limbeck.models.text import TextEncoder
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.sensedict_skd import SenseDictSKD, SenseDistiller, sensedict_skd_loss
from limbeck.teachers import several
from tests.schemes.tiny import cast, llama, pairs, weights


def scene(**changes: Any) -> Cast:
    given = cast(CrossEntropy(), **changes)
    given.student = llama(layers=2, seed=1).double()
    if isinstance(given.teacher, FrozenTeacher):
        given.teacher = FrozenTeacher(llama(width=24, layers=2, seed=2).double())
    return given


def ready(given: Cast, **options: Any) -> tuple[SenseDistiller, LanguageLoader]:
    (training,) = SenseDictSKD(**{"clusters": 3, "least": 4, **options}).trainings(given)
    assert callable(training.train)
    loader = training.train()
    distiller = training.stages[0].distiller
    assert isinstance(distiller, SenseDistiller)
    assert isinstance(loader, LanguageLoader)
    return distiller, loader


def test_the_equation_written_out() -> None:
    torch.manual_seed(0)
    own, other, senses = torch.randn(7, 5).double(), torch.randn(7, 5).double(), torch.randn(7, 4, 5).double()
    there = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 2, 1]).unsqueeze(1)
    wanted = []
    for n in range(7):
        known = senses[n][there[n]]
        wanted.append(F.cross_entropy((known @ own[n]).unsqueeze(0), (known @ other[n]).argmax().view(1)))
    found = sensedict_skd_loss(own, other, senses, there, reduction="none")
    torch.testing.assert_close(found, torch.stack(wanted))
    assert float(found[1]) == float(found[6]) == 0.0  # a token of one sense teaches nothing
    assert float(sensedict_skd_loss(own[:0], other[:0], senses[:0])) == 0.0


def test_a_student_that_is_the_teacher_chooses_as_it_does() -> None:
    torch.manual_seed(0)
    states, senses = torch.randn(9, 5), torch.randn(9, 4, 5)
    chosen = torch.einsum("nkd,nd->nk", senses, states)
    found = sensedict_skd_loss(states, states, senses, reduction="none")
    torch.testing.assert_close(found, -chosen.log_softmax(1).max(1).values)


def test_the_dictionary_is_what_the_teacher_says_of_each_token() -> None:
    given = scene(data=pairs(validation=0).train.subset(torch.arange(12)))
    distiller, loader = ready(given, half=False, least=1000)
    dictionary = distiller.senses.ready("dictionary")
    known: dict[int, list[Tensor]] = {}
    model = given.teacher.model  # type: ignore[union-attr]
    for row in range(0, len(loader.split)):
        ids = loader.rows.batch(torch.tensor([row])).inputs["input_ids"]
        with torch.no_grad():
            found: list[Tensor] = []
            handle = model.model.layers[1].register_forward_hook(lambda m, a, o, f=found: f.append(_first(o)))
            model(input_ids=ids[:, : int(loader.rows.lengths[row])])
            handle.remove()
        for token, state in zip(ids[0].tolist(), found[0][0], strict=False):
            known.setdefault(token, []).append(state)
    for token in known:
        if token in (0, 1):
            assert not bool(dictionary.known(torch.tensor([token])))
            continue
        senses, there = dictionary.of_tokens(torch.tensor([token]))
        assert int(there.sum()) == len(known[token])
        apart = torch.cdist(senses[0][there[0]].double(), torch.stack(known[token]))
        assert float(apart.min(0).values.max()) < 1e-5


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_who_learns() -> None:
    given = scene()
    distiller, loader = ready(given)
    batch = distiller.made(next(iter(loader.batches(0))))
    distiller.setup(batch)
    distiller(batch).total.backward()
    senses = distiller.senses
    assert senses.adaptor is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in senses.adaptor.parameters())
    assert all(p.grad is None for p in given.teacher.model.parameters())  # type: ignore[union-attr]
    assert not list(senses.ready("dictionary").parameters())
    assert not any("dictionary" in name for name in distiller.state_dict())
    ids = batch.inputs["input_ids"]
    assert not bool(batch.extras["sensed"][(ids == 1) | (batch.inputs["attention_mask"] == 0)].any())


def test_micro_batches_give_the_same_gradient() -> None:
    distiller, loader = ready(scene(), clusters=2)
    batch = distiller.made(next(iter(loader.batches(0))))
    distiller.setup(batch)
    distiller(batch).total.backward()
    whole = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
    distiller.zero_grad()
    totals = {unit: float(batch.count(unit)) for unit in ("positions", "labels", "samples", "sensed")}
    for rows in (slice(0, 1), slice(1, 6)):
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        part = Batch(inputs, batch.require("labels")[rows], mask=batch.require("mask")[rows], totals=totals)
        distiller(distiller.made(part)).total.backward()
    for mine, wanted in zip([p.grad for p in distiller.parameters() if p.grad is not None], whole, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.slow
def test_the_student_learns_the_senses_and_a_run_leaves_them(tmp_path: Path) -> None:
    """It chooses the teacher's sense far more often than by chance; read again, it says the teacher's senses."""
    given = scene(steps=40, batch_size=12, config={"lr": 0.02, "optimizer": "adamw"})
    scheme = SenseDictSKD(clusters=4, least=6, weight=1.0, half=False)
    fitted = perform(scheme, given, out=tmp_path, quiet=True)
    assert (tmp_path / "senses" / "dictionary.safetensors").is_file()
    file = tmp_path / "senses" / "student.safetensors"
    model = SenseStudent.read(fitted.student, file, "blocks:-1", head=lambda meant, mask: meant)
    dictionary = SenseDictionary.load(file)[0]
    batch = given.train.example(60)  # type: ignore[union-attr]
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    found: list[Tensor] = []
    teacher = given.teacher.model  # type: ignore[union-attr]
    handle = teacher.model.layers[1].register_forward_hook(lambda m, a, o: found.append(_first(o)))
    with torch.no_grad():
        teacher(**batch.inputs)
        meant = model(ids, mask)
    handle.remove()
    counts = (mask > 0) & dictionary.known(ids)
    senses, there = dictionary.of_tokens(ids[counts])
    chosen = dictionary.chosen(ids[counts], found[0][counts].float())
    own = meant[counts].to(senses.dtype)
    right = (senses[torch.arange(len(own)), chosen] == own).all(1).double()
    several_senses = there.sum(1) > 1
    chance = (1 / there.sum(1)[several_senses]).mean()
    assert float(right[several_senses].mean()) > 1.5 * float(chance)


@pytest.mark.slow
def test_a_classifier_of_texts_stands_in_for_its_teacher(tmp_path: Path) -> None:
    """Half as wide, and with the teacher's own head behind its senses, it classifies nearly as well."""
    torch.manual_seed(0)
    ids = torch.randint(2, 20, (240, 8))
    ids[torch.arange(8) >= torch.randint(4, 9, (240, 1))] = 0
    labels = (((ids > 1) & (ids < 11)).sum(1) > ((ids >= 11).sum(1))).long()
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    options: dict[str, Any] = {"num_classes": 2, "vocabulary": 20, "dropout": 0.0}
    teacher, student = TextEncoder(16, 2, **options), TextEncoder(8, 2, **options)
    optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(teacher(**inputs), labels).backward()
        optimizer.step()
    teacher.eval()
    config = TrainConfig(steps=60, lr=0.02, optimizer="adamw", compile="off", device="cpu")
    loader = as_loader((inputs, labels), batch_size=60, train=True)
    given = Cast(student, Terms.of(CrossEntropy()), FrozenTeacher(teacher), config, loader)
    perform(SenseDictSKD(clusters=4), given, out=tmp_path, quiet=True)

    def head(meant: Tensor, mask: Tensor) -> Tensor:
        counts = mask.unsqueeze(-1).to(meant.dtype)
        return teacher.linear((teacher.norm(meant) * counts).sum(1) / counts.sum(1))

    model = SenseStudent.read(student, tmp_path / "senses" / "student.safetensors", "blocks:-1", head=head)
    with torch.no_grad():
        scores = [float((m(**inputs).argmax(1) == labels).double().mean()) for m in (teacher, model)]
    assert scores[1] > 0.9 * scores[0] > 0.8


def test_a_weight_changes_the_student_and_ends_plain() -> None:
    first = perform(SenseDictSKD(clusters=3, least=4), scene(), quiet=True).student
    second = perform(SenseDictSKD(clusters=3, least=4, weight=5.0), scene(), quiet=True).student
    assert not torch.equal(weights(first), weights(second))
    assert not any(m._forward_hooks for m in first.modules())


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="model at hand"):
        ready(scene(teacher=several.SeveralTeachers([llama(seed=2).double()])))
    with pytest.raises(ConfigError, match="no such way"):
        SenseDictSKD(cluster="guess")  # type: ignore[arg-type]
    given = scene()
    given.train = None
    with pytest.raises(DataError, match="senses are those of tokens"):
        ready(given)
    with pytest.raises(TensorError, match="no state for each token"):
        ready(scene(), teacher_tap="model.rotary_emb")
