"""Three strangers on the core: two players without data, tokens with unequal vocabularies, a student without edges."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.objective import Contract, Objective
from limbeck.core.survey import call_model
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace
from limbeck.functional import kd_loss
from limbeck.objectives import KD, CrossEntropy

# --- Without data: a generator looks for images on which student and teacher disagree, the student learns them.


class SeeThrough:
    """A frozen teacher whose gradients pass to its inputs: to the generator that made them, never to its weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        self.close = Listener(self.model, taps, batch.inputs).close

    def __call__(self, batch: Batch) -> Trace:
        frozen = {name: p.detach() for name, p in self.model.named_parameters()}
        return Trace(functional_call(self.model, frozen, (batch.inputs,)))

    def to(self, device: torch.device | str) -> SeeThrough:
        self.model.to(device)
        return self


class DataFree(Distiller):
    """``batch.inputs`` is noise. First the generator takes a step, then the student."""

    turns = ("generator", "student")

    def __init__(self, student: nn.Module, generator: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student, KD(temperature=1.0), SeeThrough(teacher))
        self.generator = generator

    def setup(self, batch: Batch, data: object = None) -> DataFree:
        super().setup(batch.replace(inputs=self.generator(batch.inputs).detach()))
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        images = self.generator(batch.inputs)
        if turn == "student":
            return super().forward(batch.replace(inputs=images.detach()))
        student, teacher = self.traces(batch.replace(inputs=images))
        gap = -(student.logits - teacher.logits).abs().mean() * batch.share("samples")
        return Losses(gap, {"disagreement": gap.detach()}, {"disagreement": torch.ones(())})

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        return (self.generator if turn == "generator" else self.student).parameters()


def test_two_players_take_turns_without_data() -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    before = copy.deepcopy(teacher.state_dict())
    student = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    generator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6))
    distiller = DataFree(student, generator, teacher).setup(Batch(torch.randn(2, 3)))
    optimizers = {
        turn: torch.optim.Adam(distiller.parameters_of(turn), lr=lr)
        for turn, lr in zip(distiller.turns, (1e-3, 1e-2), strict=True)
    }
    real = torch.randn(256, 6)

    def unlike() -> float:
        with torch.no_grad():
            return float(kd_loss(student(real), teacher(real), temperature=1.0))

    start = unlike()
    for _ in range(150):
        noise = Batch(torch.randn(32, 3))
        for turn in distiller.turns:
            frozen = {n: p.clone() for n, p in distiller.named_parameters() if not n.startswith(turn)}
            optimizers[turn].zero_grad()
            distiller(noise, turn).total.backward()
            optimizers[turn].step()
            moved = [n for n, p in distiller.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
            assert moved == []
    assert unlike() < 0.3 * start
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_generator_raises_the_disagreement_it_is_given_the_gradient_of() -> None:
    teacher, student, generator = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(3, 6)
    distiller = DataFree(student, generator, teacher).setup(Batch(torch.randn(2, 3)))
    optimizer, noise = torch.optim.SGD(distiller.parameters_of("generator"), lr=0.1), Batch(torch.randn(16, 3))
    totals = []
    for _ in range(10):
        optimizer.zero_grad()
        losses = distiller(noise, "generator")
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total.detach()))
    assert totals[-1] < totals[0] < 0
    direct = -(student(generator(noise.inputs)) - teacher(generator(noise.inputs))).abs().mean()
    wanted = torch.autograd.grad(direct, generator.weight)[0]
    optimizer.zero_grad()
    distiller(noise, "generator").total.backward()
    assert torch.allclose(generator.weight.grad, wanted)  # through the teacher as well as through the student


# --- Tokens: the teacher has its own tokenizer and a smaller vocabulary.


class Aligned(Objective):
    """KD at the positions where both tokenizations end together, over the vocabulary of the student.

    ``batch.extras["ends"]`` ``[B, T]``: the teacher's position that ends where this one does;
    ``batch.extras["aligned"]`` ``[B, T]``: True where there is one. Tokens that the teacher lacks get no
    probability.
    """

    contract = Contract(normalizer="aligned", at_equal=None, mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        known, wanted = teacher.logits.shape[-1], student.logits.shape[-1]
        rows = teacher.logits.gather(1, batch.extras["ends"].unsqueeze(-1).expand(-1, -1, known))
        lowest = torch.finfo(rows.dtype).min
        rows = nn.functional.pad(rows, (0, max(wanted - known, 0)), value=lowest)[..., :wanted]
        return kd_loss(student.logits, rows, temperature=2.0, mask=batch.extras["aligned"])


class Tagger(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.embedding(ids)))}


def tokens() -> Batch:
    length, own_length = 7, 5
    ids, own = torch.randint(0, 32, (6, length)), torch.randint(0, 32, (6, own_length))
    ends = torch.tensor([0, 1, 0, 2, 0, 3, 4]).expand(6, -1).clone()
    mask = torch.arange(length) < torch.tensor([7, 3, 5, 1, 0, 6]).unsqueeze(1)
    aligned = mask & torch.tensor([True, True, False, True, False, True, True])
    labels = torch.randint(0, 16, (6, length))
    extras = {"ends": ends, "aligned": aligned}
    return Batch(ids, labels=labels, mask=mask, teacher_inputs={"ids": own}, extras=extras)


def part(batch: Batch, rows: slice) -> Batch:
    return batch.replace(
        inputs=batch.inputs[rows],
        labels=batch.labels[rows],
        mask=batch.mask[rows],
        teacher_inputs={"ids": batch.teacher_inputs["ids"][rows]},
        extras={name: value[rows] for name, value in batch.extras.items()},
    )


@pytest.mark.parametrize("vocabulary", [12, 20], ids=["smaller", "larger"])
def test_tokens_with_unequal_vocabularies_are_the_same_in_any_split(vocabulary: int) -> None:
    student, teacher, batch = Tagger(16, 8).double(), Tagger(vocabulary, 12).double(), tokens()
    distiller = Distiller(student, CrossEntropy() + 0.5 * Aligned(), teacher).setup(batch)
    whole = distiller(batch)
    whole.total.backward()
    wanted = {n: p.grad.clone() for n, p in student.named_parameters()}
    assert whole.total.isfinite()
    student.zero_grad()
    units = {o.contract.normalizer for o in distiller.loss}
    assert batch.count("aligned") < batch.count("positions")
    totals = {unit: batch.count(unit) for unit in units}
    found = 0.0
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        losses = distiller(part(batch, rows).replace(totals=totals))
        losses.total.backward()
        found += float(losses.total.detach())
    assert found == pytest.approx(float(whole.total.detach()), rel=1e-6)  # shares are float32
    for name, p in student.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-8), name


def test_padding_and_unaligned_positions_change_nothing() -> None:
    student, teacher, batch = Tagger(16, 8), Tagger(12, 12), tokens()
    distiller = Distiller(student, Aligned(), teacher).setup(batch)
    other = batch.replace(inputs=torch.where(batch.extras["aligned"], batch.inputs, 31 - batch.inputs))
    assert torch.equal(distiller(batch).total, distiller(other).total)


def test_tokens_the_teacher_lacks_lose_their_probability() -> None:
    student, teacher, batch = Tagger(16, 8), Tagger(12, 12), tokens()
    distiller = Distiller(student, Aligned(), teacher).setup(batch)
    distiller(batch).total.backward()
    unknown = student.head.bias.grad[12:]
    assert (unknown > 0).all()  # a step against the gradient lowers them
    assert student.head.bias.grad.isfinite().all()


# --- A graph: the teacher sees the edges, the student only the nodes' own features.


class GCN(nn.Module):
    """Two dense graph convolutions: features ``[N, F]`` and a normalised adjacency ``[N, N]``."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(adjacency @ torch.relu(self.first(adjacency @ x)))


def graph() -> tuple[Batch, Tensor]:
    """Two communities: their members' features say little, their neighbours' together say much."""
    nodes, generator = 80, torch.Generator().manual_seed(0)
    labels = torch.arange(nodes) % 2
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    edges = torch.rand(nodes, nodes, generator=generator) < torch.where(same, 0.3, 0.02)
    adjacency = (edges | edges.T | torch.eye(nodes, dtype=torch.bool)).float()
    degree = adjacency.sum(1)
    adjacency = adjacency / (degree.unsqueeze(0) * degree.unsqueeze(1)).sqrt()
    x = torch.randn(nodes, 8, generator=generator) + 0.7 * labels.unsqueeze(1)
    mask = torch.rand(nodes, generator=generator) < 0.5
    return Batch(x, labels=labels, mask=mask, teacher_inputs=(x, adjacency)), adjacency


def test_a_student_without_edges_learns_from_a_teacher_with_them() -> None:
    batch, _ = graph()
    teacher = GCN(8, 2)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(call_model(teacher, batch.teacher_inputs), batch.labels).backward()
        optimizer.step()
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    distiller = Distiller(student, KD(temperature=1.0), teacher).setup(batch)
    step = torch.optim.Adam(distiller.parameters(), lr=0.02)
    first = float(distiller(batch).total.detach())
    for _ in range(60):
        step.zero_grad()
        distiller(batch).total.backward()
        step.step()
    assert float(distiller(batch).total.detach()) < 0.2 * first
    with torch.no_grad():
        told = call_model(teacher, batch.teacher_inputs).argmax(1)
        assert (student(batch.inputs).argmax(1) == told)[batch.mask].float().mean() > 0.9


def test_the_student_sees_no_edge_and_masked_nodes_teach_nothing() -> None:
    batch, adjacency = graph()
    student, teacher = nn.Linear(8, 2), GCN(8, 2)
    distiller = Distiller(student, KD() + CrossEntropy(), teacher).setup(batch)
    before = distiller(batch)
    cut = distiller(batch.replace(teacher_inputs=(batch.inputs, torch.eye(len(adjacency)))))
    assert torch.equal(before.logits, cut.logits)
    assert not torch.equal(before.terms["kd"], cut.terms["kd"])
    assert torch.equal(before.terms["cross_entropy"], cut.terms["cross_entropy"])
    labels = torch.where(batch.mask, batch.labels, 1 - batch.labels)
    assert torch.equal(distiller(batch.replace(labels=labels)).total, before.total)
