"""DistilMulti-BERT: how it begins, both losses of teachers of the same tokens and of others, and its gaps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import ConfigError, DataError, ModelError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.collate import part_of
from limbeck.data.language import LanguageLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build
from limbeck.schemes.many_teachers.half_layers import start_from
from limbeck.schemes.many_teachers.token_spans import piece_means, pieces, same_spans
from tests.schemes.gaps import bert, texts
from tests.schemes.tiny import pairs

OTHER = {"teacher_tokenizer": {"bpe": 300}, "teacher_mask": 2}


def sharp(model):
    """Sure of what it says, and without dropout."""
    for parameter in model.parameters():
        parameter.data *= 3.0
    return model.double().eval()


def cast(teachers, data=None, **options) -> Cast:
    source = texts(**options) if data is None else data
    loader = LanguageLoader(source.train, batch_size=6, seed=1)
    named = {name: FrozenTeacher(model) for name, model in teachers.items()}
    student = sharp(bert(layers=2, seed=1))
    return Cast(student, 2.0 * Terms.of(CrossEntropy()), None, TrainConfig(steps=3), loader, teachers=named)


def distiller(teachers, options=None, **scheme):
    given = cast(teachers, **(options or {}))
    (training,) = build("distilmulti_bert_ro", **{"start": False, **scheme}).trainings(given)
    batch = next(iter(given.train.batches()))
    found = training.stages[0].distiller.setup(batch)
    return quiet(found.train()), batch


def quiet(found):
    """Training without dropout."""
    for module in found.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return found


def heard(model, ids, mask):
    said = model(ids, attention_mask=mask, output_hidden_states=True)
    return said.logits, said.hidden_states[-1]


def test_it_is_distilbert_s_loss_with_the_mean_of_both_teachers() -> None:
    teachers = {"a": sharp(bert(layers=4, seed=2)), "b": sharp(bert(layers=4, seed=3))}
    found, batch = distiller(teachers)
    batch = found.made(batch)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    there = mask > 0
    logits, states = heard(found.student, ids, mask)
    said = [heard(model, ids, mask) for model in teachers.values()]
    p = torch.stack([(z / 2).softmax(-1) for z, _ in said]).mean(0)
    log_q = (logits / 2).log_softmax(-1)
    divergence = 4 * (p * (p.log() - log_q)).sum(-1)[there].mean()
    cosine = torch.stack([1 - F.cosine_similarity(states, h, dim=-1)[there].mean() for _, h in said]).mean()
    gaps = F.cross_entropy(logits[batch.mask], batch.extras["whole"][batch.mask])
    torch.testing.assert_close(found(batch).total, 5 * divergence + 2 * gaps + cosine)


def test_so_many_identical_teachers_are_one() -> None:
    one, batch = distiller({"a": sharp(bert(layers=4, seed=2))})
    three, _ = distiller({name: sharp(bert(layers=4, seed=2)) for name in "abc"})
    made = one.made(batch)
    torch.testing.assert_close(one(made).total, three(made).total)


def test_teachers_sure_of_different_tokens_share_the_probability() -> None:
    found, _ = distiller({"a": sharp(bert(layers=4, seed=2)), "b": sharp(bert(layers=4, seed=3))})
    sure = 400 * torch.eye(258)[[5, 9]].double().view(2, 1, 1, 258)
    mean = found._mean(torch.zeros(1, 1, 258).double(), [Trace(None, {"logits": z}) for z in sure])
    torch.testing.assert_close((mean / 2).softmax(-1)[0, 0, [5, 9]], torch.tensor([0.5, 0.5]).double())


def test_gaps_are_drawn_anew_and_parts_of_a_step_add_up() -> None:
    found, batch = distiller({"a": sharp(bert(layers=4, seed=2))})
    torch.manual_seed(0)
    first, second = found.made(batch), found.made(batch)
    assert not torch.equal(first.mask, second.mask)
    totals = {name: first.count(name) for name in ("labels", "attended")}
    assert {o.contract.normalizer for o in found.objectives()} == set(totals)
    parts = [found(part_of(first, rows).replace(totals=totals)).total for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), found(first).total)


def test_a_teacher_of_other_tokens_teaches_what_both_cut_alike() -> None:
    source = texts(**OTHER)
    size = source.train.teacher_tokens.size
    other = sharp(bert(vocabulary=size, layers=4, seed=3))
    teachers = {"own": sharp(bert(layers=4, seed=2)), "other": other}
    given = cast(teachers, source)
    (training,) = build("distilmulti_bert_ro", start=False, other=["other"]).trainings(given)
    batch = next(iter(given.train.batches()))
    found = quiet(training.stages[0].distiller.setup(batch).train())
    batch = found.made(batch)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    logits, states = heard(found.student, ids, mask)
    own_logits, own_states = heard(teachers["own"], ids, mask)
    reads = batch.teacher_inputs
    other_logits, other_states = heard(other, reads["input_ids"], reads["attention_mask"])
    there, theirs = mask > 0, reads["attention_mask"] > 0
    spans, other_spans = batch.extras["offsets"], batch.extras["teacher_offsets"]
    pairs = same_spans(spans, other_spans, there, theirs)
    tables = source.train.tokens.table(), source.train.teacher_tokens.table()
    assert len(found.own_ids) > 20
    rows = []
    for i, j in (pairs >= 0).nonzero().tolist():
        p = (other_logits[i, pairs[i, j], found.other_ids] / 2).softmax(-1)
        rows.append(4 * (p * (p.log() - (logits[i, j, found.own_ids] / 2).log_softmax(-1))).sum())
    assert len(rows) > 5
    divergence = (kd_loss(logits, own_logits, temperature=2.0, mask=there) + torch.stack(rows).mean()) / 2
    number = pieces(spans, other_spans, there, theirs)
    first, known = piece_means(states, number[0], 40)
    second, _ = piece_means(other_states, number[1], 40)
    gaps = 1 - F.cosine_similarity(first[known], second[known], dim=-1)
    cosine = ((1 - F.cosine_similarity(states, own_states, dim=-1))[there].mean() + gaps.mean()) / 2
    losses = found(batch)
    torch.testing.assert_close(losses.terms["kl"], divergence.detach())
    torch.testing.assert_close(losses.terms["cosine"], cosine.detach())
    assert tables[0] != tables[1]
    totals = {o.contract.normalizer: batch.count(o.contract.normalizer) for o in found.objectives()}
    assert totals.keys() == {"labels", "attended", "common_tokens", "common_pieces"}
    assert [int(totals[name]) for name in ("common_tokens", "common_pieces")] == [len(rows), int(known.sum())]
    parts = [found(part_of(batch, own).replace(totals=totals)).total for own in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), losses.total)


def test_the_student_begins_as_every_second_layer() -> None:
    teacher, student = bert(layers=4, seed=2), bert(layers=2, seed=1)
    assert start_from(student, FrozenTeacher(teacher)) == 2
    own, other = student.state_dict(), teacher.state_dict()
    for name, value in own.items():
        source = name.replace("layer.1.", "layer.2.")
        assert torch.equal(value, other[source]), name
    given = cast({"a": teacher})
    given.student.float()
    next(iter(build("distilmulti_bert_ro").trainings(given)))
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(given.student.state_dict()[name], other[name.replace("layer.1", "layer.2")])
    with pytest.raises(ModelError, match="every n-th"):
        start_from(bert(layers=3), FrozenTeacher(teacher))
    with pytest.raises(ModelError, match="not built alike"):
        start_from(bert(layers=2, width=8), FrozenTeacher(teacher))


def test_it_is_judged_by_hidden_tokens_and_learns_them() -> None:
    found, batch = distiller({"a": sharp(bert(layers=4, seed=2))})
    assert list(found.eval()(batch).terms) == ["cross_entropy"]
    quiet(found.train())
    optimizer = torch.optim.Adam(found.student.parameters(), lr=0.01)
    torch.manual_seed(0)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        losses = found(found.made(batch))
        losses.total.backward()
        optimizer.step()
        values.append(float(losses.terms["kl"]))
    assert sum(values[-3:]) < 0.85 * sum(values[:3])


def test_mistakes() -> None:
    teachers = {"a": bert(layers=4, seed=2)}
    with pytest.raises(DataError, match="texts with gaps"):
        next(iter(build("distilmulti_bert_ro").trainings(cast(teachers, pairs()))))
    with pytest.raises(ConfigError, match="no such teacher"):
        next(iter(build("distilmulti_bert_ro", other=["b"]).trainings(cast(teachers))))
    with pytest.raises(DataError, match="are not known"):
        next(iter(build("distilmulti_bert_ro", other=["a"]).trainings(cast(teachers))))
    with pytest.raises(ConfigError, match="has the student's tokens"):
        next(iter(build("distilmulti_bert_ro", other=["a"]).trainings(cast(teachers, texts(**OTHER)))))
    wide, batch = distiller({"a": sharp(bert(layers=4, width=8, seed=2))})
    with pytest.raises(ModelError, match="other widths"):
        wide(wide.made(batch))
