"""Sequence-level distillation: what is written, what of it is learned, and by which weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError, LimbeckError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import load_source
from limbeck.data.language import LanguageLoader, train_bpe
from limbeck.functional import cross_entropy_loss, kd_loss
from limbeck.objectives import KD, ULD, CrossEntropy
from limbeck.recipes.check import check
from limbeck.recipes.distill import distill
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe
from limbeck.schemes import Cast, Offline, SeqKD, Training, perform
from limbeck.teachers.answers import Answer
from limbeck.teachers.routed import RoutedTeacher
from tests.schemes.tiny import cast, llama, pairs, records, weights
from tests.teachers.conftest import Loopback, loopback  # noqa: F401  a fixture

SHORT: dict[str, Any] = {"max_new_tokens": 6, "unfinished": "keep", "beams": 3}


def training(scene: Cast, **options: Any) -> tuple[Training, LanguageLoader]:
    (found,) = SeqKD(**{**SHORT, **options}).trainings(scene)
    assert callable(found.train)
    loader = found.train()
    assert isinstance(loader, LanguageLoader)
    return found, loader


def rows_of(loader: LanguageLoader) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt and completion."""
    found = []
    for row in range(len(loader.split)):
        batch = loader.rows.batch(torch.tensor([row]))
        ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0].tolist()
        first = int(batch.mask[0].int().argmax()) + 1
        found.append((ids[:first], ids[first:]))
    return found


def texts_of(loader: LanguageLoader) -> list[tuple[str, str]]:
    decode = loader.split.tokens.decode
    return [(decode(prompt), decode(said)) for prompt, said in rows_of(loader)]


class Fixed:
    """Answers with what it is told, and counts."""

    def __init__(self, answer: Callable[[str], Sequence[str]], reason: str = "stop") -> None:
        self.answer, self.reason, self.asked = answer, reason, list[str]()

    def generate(self, prompts: Sequence[str], *, max_tokens: int, n: int = 1, **_: Any) -> list[list[Answer]]:
        self.asked += prompts
        return [[Answer(text, finish_reason=self.reason) for text in self.answer(p)[:n]] for p in prompts]

    def each(self, prompts: Sequence[str], **settings: Any) -> Iterator[tuple[int, list[Answer]]]:
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None: ...


def test_it_learns_what_a_plain_beam_search_finds() -> None:
    """Rows are the best of all beams, found by brute force over unpadded texts; the loss is the ordinary one."""
    scene = cast(CrossEntropy())
    found, loader = training(scene, beams=3, max_new_tokens=3)
    model = scene.teacher.model

    def step(prefix: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)

    for prompt, said in rows_of(loader)[:4]:
        alive, done = [(0.0, list[int]())], list[tuple[float, list[int]]]()
        for place in range(3):
            more = []
            for score, text in alive:
                best = step(prompt + text).topk(6)
                more += [(score + float(s), [*text, int(t)]) for s, t in zip(*best, strict=True)]
            more = sorted(more, key=lambda pair: -pair[0])[:6]
            done += [pair for pair in more if pair[1][-1] == 1 or place == 2]
            alive = [pair for pair in more if pair[1][-1] != 1][:3]
        assert said == max(done)[1]
    # And so from the first step on: the student's loss is that of these tokens.
    distiller, batch = found.stages[0].distiller, loader.example(4)
    distiller.setup(batch)
    wanted, count = 0.0, 0
    for prompt, said in rows_of(loader)[:4]:
        logits = scene.student(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        for place, token in enumerate(said, start=len(prompt) - 1):
            wanted, count = wanted - float(logits[place, token].detach()), count + 1
    assert float(distiller(distiller.made(batch)).total.detach()) == pytest.approx(wanted / count, rel=1e-9)


def test_a_teacher_that_is_sure_is_learned_as_data_are() -> None:
    """What it writes, given as data and learned by plain training, gives the same weights bit for bit."""
    answers = {r["prompt"]: f" {r['prompt'][::-1]}." for r in records()}
    told = Fixed(lambda prompt: [answers[prompt]])
    written = perform(SeqKD(writer=told), cast(CrossEntropy(), teacher=None), quiet=True)
    assert sorted(told.asked) == sorted(answers)  # every prompt once
    data = [{"prompt": p, "completion": answers[p]} for p in dict.fromkeys(r["prompt"] for r in records())]
    split = load_source(data, tokenizer="bytes", length=32, validation=0).train
    plain = perform(Offline(), cast(CrossEntropy(), teacher=None, data=split), quiet=True)
    assert torch.equal(weights(written.student), weights(plain.student))


def test_word_level_and_sequence_level() -> None:
    """The card's identities of Word-KD; beside cross-entropy it learns from the teacher's own sequences."""
    own, other = torch.randn(2, 5, 7, dtype=torch.double), torch.randn(2, 5, 7, dtype=torch.double)
    labels = other.argmax(-1)
    sure = torch.full_like(other, -torch.inf).scatter(-1, labels.unsqueeze(-1), 0.0)
    torch.testing.assert_close(kd_loss(own, sure, temperature=1.0), cross_entropy_loss(own, labels=labels))
    word = -(other.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()
    entropy = -(other.softmax(-1) * other.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(kd_loss(own, other, temperature=1.0) + entropy, word)
    assert float(kd_loss(other, other, temperature=1.0)) == pytest.approx(0.0, abs=1e-12)
    loss = 0.5 * CrossEntropy() + 0.5 * KD(temperature=1.0)
    fitted = perform(SeqKD(**SHORT), cast(loss), quiet=True)
    assert {"cross_entropy", "kd"} <= set(fitted.history[-1]["terms"])


def test_interpolation_takes_what_is_most_like_the_data() -> None:
    gold = {r["prompt"]: r["completion"] for r in records()}
    data = [{"prompt": prompt, "completion": completion} for prompt, completion in gold.items()]
    split = load_source(data, tokenizer="bytes", length=32, validation=0).train
    told = Fixed(lambda prompt: ["zzz", gold[prompt][:-1], gold[prompt], gold[prompt][1:]])

    def said(beams: int) -> dict[str, str]:
        scene = cast(CrossEntropy(), teacher=None, data=split)
        return dict(texts_of(training(scene, writer=told, beams=beams, interpolation=True)[1]))

    assert said(4) == gold  # the data's own is among them
    assert said(2) == {prompt: completion[:-1] for prompt, completion in gold.items()}
    assert set(said(1).values()) == {"zzz"}
    # With one beam there is nothing to choose from: it is Seq-KD.
    first, second = (rows_of(training(cast(CrossEntropy()), beams=1, interpolation=i)[1]) for i in (False, True))
    assert first == second
    assert rows_of(training(cast(CrossEntropy()), beams=4, interpolation=True)[1]) != first


@pytest.mark.parametrize("accumulate", [1, 3])
def test_alpha_mixes_both_by_their_own_means(accumulate: int) -> None:
    """One step by hand: the mean over the data's tokens and that over the written ones, weighed."""
    told = Fixed(lambda prompt: ["x" * (1 + len(prompt) % 4)] if len(prompt) != 3 else [""], reason="stop")
    scene = cast(
        CrossEntropy(), teacher=None, steps=1, config={"accumulate": accumulate, "schedule": "constant", "lr": 0.5}
    )
    student = llama(seed=1, sharp=6.0).double()
    assert isinstance(scene.train, LanguageLoader)
    (batch,) = next(scene.train.epoch(0))
    seen, losses = set(), [[0.0, 0], [0.0, 0]]
    everyone = rows_of(scene.train)
    first = {tuple(prompt): row for row, (prompt, _) in reversed(list(enumerate(everyone)))}
    for row in batch.index.tolist():
        prompt, gold = everyone[row]
        text = told.answer(scene.train.split.tokens.decode(prompt))[0]
        said = [*scene.train.split.tokens.encode([text])[0][0].tolist(), 1]
        for side, completion in enumerate((gold, said)):
            if side and first[tuple(prompt)] != row:  # an equal pair, which is learned with its first row
                continue
            logits = student(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            for place, token in enumerate(completion, start=len(prompt) - 1):
                losses[side][0] = losses[side][0] - logits[place, token]
                losses[side][1] += 1
        seen.add(tuple(prompt))
    assert losses[1][1] > 0
    (0.3 * losses[0][0] / losses[0][1] + 0.7 * losses[1][0] / losses[1][1]).backward()
    wanted = torch.cat([(p - 0.5 * (p.grad + 0)).detach().flatten() for p in student.parameters()])
    settings = {"momentum": 0.0}
    scene.config = scene.config.model_copy(update={"optimizer_options": settings, "weight_decay": 0.0})
    fitted = perform(SeqKD(alpha=0.7, writer=told), scene, quiet=True)
    torch.testing.assert_close(weights(fitted.student), wanted, atol=1e-7, rtol=0)
    assert {"cross_entropy", "written/cross_entropy"} <= set(fitted.history[-1]["terms"])


def test_without_alpha_nothing_is_written() -> None:
    told = Fixed(lambda prompt: ["x"])
    first = perform(SeqKD(alpha=0.0, writer=told), cast(CrossEntropy(), teacher=None), quiet=True)
    second = perform(Offline(), cast(CrossEntropy(), teacher=None), quiet=True)
    assert torch.equal(weights(first.student), weights(second.student))
    assert told.asked == []


def test_what_is_left_out(tmp_path: Path) -> None:
    short, cut = Fixed(lambda prompt: ["y" * len(prompt)]), Fixed(lambda prompt: ["y"], reason="length")
    scene = cast(CrossEntropy(), teacher=None, folder=tmp_path)
    _, loader = training(scene, writer=short, times=1.0, plus=0)  # a prompt has its front mark besides
    assert len(loader.split) == len({r["prompt"] for r in records()})
    summary = json.loads((tmp_path / "written" / "summary.json").read_text())
    assert (summary["rows"], summary["equal"]) == (len(loader.split), 60 - len(loader.split))
    with pytest.raises(DataError, match=r"nothing of what the teacher wrote.*60 too long.*raise max_new_tokens"):
        training(scene, writer=short, times=0.5, plus=0)
    with pytest.raises(DataError, match=r"60 unfinished.*unfinished: keep"):
        training(scene, writer=cut, unfinished="drop")
    _, loader = training(scene, writer=cut, unfinished="keep")
    assert {tuple(said) for _, said in rows_of(loader)} == {(ord("y") + 2,)}  # no end that nobody wrote
    with pytest.raises(DataError, match=r"unfinished"):
        training(cast(CrossEntropy()), unfinished="drop", max_new_tokens=1)


def test_other_tokenizers_learn_the_text() -> None:
    """A teacher with merges of its own writes; the student gets its text in bytes. Word by word is refused."""
    bpe = train_bpe([r["prompt"] + r["completion"] for r in records()], 262)
    options = {"teacher_tokenizer": bpe}
    teacher = FrozenTeacher(llama(262, width=24, seed=2, sharp=8.0).double())
    scene = cast(CrossEntropy(), teacher=teacher, options=options)
    _, loader = training(scene)
    other = loader.split.tokens
    assert other.name == "bytes"
    asked = {r["prompt"]: [*bpe.front, *bpe.encode([r["prompt"]])[0][0].tolist()] for r in records()}
    for prompt, said in texts_of(loader)[:5]:
        alone = teacher.model.generate(
            torch.tensor([asked[prompt]]), max_new_tokens=6, num_beams=3, length_penalty=0.0, eos_token_id=bpe.eos
        )
        written = alone[0, len(asked[prompt]) :].tolist()
        written = written[: written.index(bpe.eos)] if bpe.eos in written else written
        assert said == bpe.decode(written)
    perform(SeqKD(**SHORT), cast(CrossEntropy(), teacher=teacher, options=options), quiet=True)
    with pytest.raises(DataError, match="kd: teacher and student have different tokenizers"):
        perform(
            SeqKD(max_new_tokens=6, writer=Fixed(lambda p: ["ok"])),
            cast(KD(), teacher=teacher, options=options),
            quiet=True,
        )
    both = cast(ULD(), teacher=teacher, options=options)
    fitted = perform(SeqKD(writer=Fixed(lambda p: [p[::-1]])), both, quiet=True)
    assert fitted.history[-1]["terms"]["uld"] > 0
    with pytest.raises(ConfigError, match="scheme.unfinished: texts without an end"):
        next(iter(SeqKD(unfinished="keep").trainings(both)))


def recipe(folder: Path, url: str, **scheme: Any) -> Recipe:
    writer = {"base_url": url, "model": "tiny", "key_env": None}
    made = {
        "data": {"source": "tests.schemes.tiny:pairs", "batch_size": 8},
        "student": {"model": "tests.schemes.tiny:llama"},
        "loss": "cross_entropy",
        "scheme": {"seq_kd": {"writer": writer, "max_new_tokens": 8, **scheme}},
        "train": {"steps": 3, "lr": 0.05},
    }
    return Recipe.model_validate(made)


@pytest.mark.slow
def test_a_served_teacher(loopback: Callable[..., Loopback], tmp_path: Path) -> None:  # noqa: F811
    """Over HTTP, from a recipe: a check asks nothing, a run asks each prompt once, and a run anew asks the record."""
    server = loopback()
    served = recipe(tmp_path, server.url, alpha=0.5)
    assert check(served) == []
    assert server.asked() == []
    first = run(served, tmp_path / "run", quiet=True)
    asked = server.asked()
    assert len(asked) == len(set(asked)) > 5
    assert set(asked) <= {r["prompt"] for r in records()}
    server.kill()
    (tmp_path / "run" / "result.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    again = run(served, tmp_path / "run", resume=True, quiet=True)  # the server is gone, what it said is not
    assert again["perplexity"] == first["perplexity"]
    server.start()


def test_each_prompt_is_put_to_the_teacher_of_its_tag() -> None:
    data = [{"prompt": f"q{i % 4}", "completion": " a", "tag": "even" if i % 2 else "odd"} for i in range(12)]
    both = {tag: Fixed(lambda p, tag=tag: [f" {tag} {p}"]) for tag in ("even", "odd")}
    scene = cast(
        CrossEntropy(), data=load_source(data, tokenizer="bytes", validation=0).train, teacher=None, batch_size=2
    )
    _, loader = training(scene, writer=RoutedTeacher(both))
    assert dict(texts_of(loader)) == {f"q{i}": f" {'even' if i % 2 else 'odd'} q{i}" for i in range(4)}
    assert sorted(both["even"].asked) == ["q1", "q3"]
    with pytest.raises(DataError, match="no teacher has this tag"):
        training(scene, writer=RoutedTeacher({"even": both["even"]}))
    _, loader = training(scene, writer=RoutedTeacher({"even": both["even"]}, default="even"))
    assert dict(texts_of(loader))["q0"] == " even q0"
    with pytest.raises(ConfigError, match="scheme.writer.teachers.even"):
        training(cast(CrossEntropy(), teacher=None), writer={"teachers": {"even": {"model": "x"}}})


def test_several_served_teachers(loopback: Callable[..., Loopback], tmp_path: Path) -> None:  # noqa: F811
    server = loopback()
    data = [{"prompt": f"q{i}", "completion": " a", "tag": "even" if i % 2 else "odd"} for i in range(8)]
    scene = cast(
        CrossEntropy(), data=load_source(data, tokenizer="bytes", validation=0).train, teacher=None, batch_size=2
    )
    options = {"base_url": server.url, "model": "tiny", "key_env": None}
    training(replace(scene, folder=tmp_path), writer={"teachers": {"even": options}, "default": "even"})
    assert len(server.asked()) == 8
    assert (tmp_path / "written" / "even").is_dir()


def test_in_python(tmp_path: Path) -> None:
    train: dict[str, Any] = {"steps": 2, "optimizer": "adamw", "lr": 1e-3, "batch_size": 8, "quiet": True}
    options = {"scheme": "seq_kd", "scheme_options": SHORT}
    done = distill(llama(width=24, seed=2), llama(seed=1), pairs(), "cross_entropy", **options, out=tmp_path, **train)
    assert done.steps == 2
    summary = json.loads((tmp_path / "written" / "summary.json").read_text())
    assert summary["rows"] + summary["equal"] == summary["prompts"]
    assert 0 < summary["mass_on_the_first"] <= 1
    texts = [r["prompt"] + r["completion"] for r in records()]
    plain = load_source(texts, tokenizer="bytes", length=32)
    options["scheme_options"] = {**SHORT, "prompt": 5}
    done = distill(llama(width=24, seed=2), llama(seed=1), plain, "cross_entropy", **options, **train)
    assert done.result["perplexity"] > 1


def test_refusals() -> None:
    for scene, message in (
        (cast(CrossEntropy(), teacher=None), "teacher: the texts are written by a teacher; found none"),
        (cast(CrossEntropy(), options={"pack": True}), "data.options.pack: a pack holds several texts"),
        (cast(CrossEntropy(), teacher=FrozenTeacher(torch.nn.Linear(2, 2))), "this model does not write texts"),
    ):
        with pytest.raises(LimbeckError, match=message):
            next(iter(SeqKD().trainings(scene)))
    for wrong in (
        {"alpha": 1.5},
        {"unfinished": "cut"},
        {"times": 0.0},
        {"prompt": 0},
        {"batch_size": 0},
        {"writer": 3},
        {"temperature": 1.0, "interpolation": True},
    ):
        with pytest.raises(ConfigError, match=f"scheme.{next(iter(wrong))}"):
            SeqKD(**wrong)
    with pytest.raises(ConfigError, match="scheme.writer.record: what is paid for has to be kept"):
        training(cast(CrossEntropy(), teacher=None), writer={"base_url": "http://localhost/v1", "model": "tiny"})
    with pytest.raises(ConfigError, match="no such option of a served teacher.*'modle'"):
        training(cast(CrossEntropy(), teacher=None, folder=Path("x")), writer={"modle": "tiny"})
