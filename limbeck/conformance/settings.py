"""Situations in which an objective is checked: a student, a teacher, batches, and what is known of the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from limbeck.conformance.models import VOCABULARY, DualEncoder, ImageClassifier, TextModel
from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.data.language.chunks import aligned_chunks
from limbeck.data.language.tokens import ByteTokens

SAMPLES = 24  # of the pretended training set
SIZE = 7  # of a batch: odd, so that no split is even
LENGTH = 6

Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Setting:
    """One situation.

    Args:
        name: What it is called in reports.
        student, teacher: Make a fresh model; weights come from the random state. A list of models are teachers that
            answer together.
        batch: Makes a batch from a seed.
        data: What objectives are told of the training set.
        classes: Of the logits; ``None`` where that is not known.
        places: Positions of a sample, which a mask may run over.
        with_two_classes: The same situation with two classes, where their number is a choice.
    """

    name: str
    student: Maker
    teacher: Maker
    batch: Callable[[int], Batch]
    data: DataInfo
    classes: int | None = None
    places: tuple[int, ...] = ()
    with_two_classes: Callable[[], Setting] | None = None


def all_settings(classes: int = 5) -> list[Setting]:
    """The suite's own situations: images, tokens with a label each, and token sequences with one label."""
    return [images(classes), tokens(classes), sequences(classes)]


def special_settings() -> dict[str, Setting]:
    """Situations by the task a card has to name for them."""
    return {
        "multilabel": multilabel(),
        "regression": regression(),
        "retrieval": retrieval(),
        "aspects": aspects(),
        "cross-tokenizer": tokenizers(),
        "several teachers": several(),
        "privacy": private(),
    }


def images(classes: int = 5) -> Setting:
    """A classifier of images ``[B, 3, 8, 8]``."""

    def batch(seed: int) -> Batch:
        return _batch(seed, classes, lambda g: torch.randn(SIZE, 3, 8, 8, generator=g))

    return Setting(
        "images",
        lambda: ImageClassifier(4, 1, classes),
        lambda: ImageClassifier(6, 2, classes),
        batch,
        _data(classes, batch),
        classes,
        with_two_classes=lambda: images(2),
    )


def tokens(classes: int = 5) -> Setting:
    """A language model: one prediction a token, ``[B, T, C]``."""

    def batch(seed: int) -> Batch:
        return _batch(seed, classes, _ids, (LENGTH,))

    return Setting(
        "tokens",
        lambda: TextModel(8, 2, classes, pool=False),
        lambda: TextModel(12, 3, classes, pool=False),
        batch,
        _data(classes, batch),
        classes,
        (LENGTH,),
        lambda: tokens(2),
    )


def sequences(classes: int = 5) -> Setting:
    """A classifier of token sequences: features by token, one prediction a sequence."""

    def batch(seed: int) -> Batch:
        return _batch(seed, classes, _ids)

    return Setting(
        "sequences",
        lambda: TextModel(8, 2, classes, pool=True),
        lambda: TextModel(12, 3, classes, pool=True),
        batch,
        _data(classes, batch),
        classes,
        (LENGTH,),
        lambda: sequences(2),
    )


def multilabel(classes: int = 5) -> Setting:
    """Images with any number of labels each: ``[B, C]`` of zeros and ones; the logits are one yes or no a class."""
    plain = images(classes)

    def batch(seed: int) -> Batch:
        drawn = torch.rand(SIZE, classes, generator=torch.Generator().manual_seed(seed))
        return plain.batch(seed).replace(labels=(drawn < 0.5).float())

    return replace(
        plain, name="multilabel", batch=batch, data=DataInfo(SAMPLES, classes=classes), with_two_classes=None
    )


def regression(targets: int = 6) -> Setting:
    """Images with coordinates to predict: labels ``[B, P]``, predictions in the place of logits.

    A second teacher's answers come with the batch, as ``extras["tolerant"]``.
    """
    plain = images(targets)

    def batch(seed: int) -> Batch:
        drawn = torch.randn(2, SIZE, targets, generator=torch.Generator().manual_seed(seed))
        return plain.batch(seed).replace(labels=drawn[0], extras={"tolerant": drawn[1]})

    return replace(plain, name="regression", batch=batch, data=DataInfo(SAMPLES), classes=None, with_two_classes=None)


def aspects(classes: int = 5) -> Setting:
    """Images with answers to yes-or-no questions, as ``extras["aspects"]``: probabilities, -1 where not asked."""
    plain = images(classes)

    def batch(seed: int) -> Batch:
        drawn = torch.rand(2, SIZE, 3, generator=torch.Generator().manual_seed(seed))
        return plain.batch(seed).replace(extras={"aspects": drawn[0].masked_fill(drawn[1] < 0.2, -1.0)})

    return replace(plain, name="aspects", batch=batch, with_two_classes=None)


def retrieval() -> Setting:
    """Pairs of images and texts; both models give match scores ``[B, B]`` in the place of logits."""

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(SAMPLES, generator=generator)[:SIZE]
        images = torch.randn(SIZE, 3, 8, 8, generator=generator)
        return Batch((images, _ids(generator)), index=index)

    return Setting("retrieval", lambda: DualEncoder(4), lambda: DualEncoder(6), batch, DataInfo(SAMPLES))


def tokenizers(classes: int = 5) -> Setting:
    """A language model whose teacher cuts the same texts into other, and more, tokens of a larger vocabulary."""
    plain, longer = tokens(classes), LENGTH + 3

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn = torch.randint(0, VOCABULARY, (SIZE, longer), generator=generator)
        counts = torch.rand(SIZE, longer, generator=generator) < 0.8
        counts[0], counts[-1] = True, False
        labels = torch.randint(0, classes + 3, (SIZE, longer), generator=generator)
        offsets, teacher_offsets = (_spans(n, generator) for n in (LENGTH, longer))
        extras = {"teacher_mask": counts, "teacher_labels": labels.masked_fill(~counts, -1)}
        extras |= {"offsets": offsets, "teacher_offsets": teacher_offsets}
        every = torch.arange(LENGTH).expand(SIZE, -1) < LENGTH - 1  # the last position's token is not there
        own, other = offsets[..., 1], teacher_offsets[..., 1]
        extras["chunk"], extras["teacher_chunk"] = aligned_chunks(own, every, other, counts & (other < 14))
        return plain.batch(seed).replace(teacher_inputs=drawn, extras=extras)

    return replace(
        plain,
        name="tokenizers",
        teacher=lambda: TextModel(12, 3, classes + 3, pool=False),
        batch=batch,
        data=replace(
            plain.data,
            batches=lambda: (batch(seed) for seed in range(3)),
            tokenizers=(_Few("a b c ab"), _Few("a b abc ca c bb abb")),
        ),
        with_two_classes=None,
    )


class _Few(ByteTokens):
    """A tokenizer as far as its vocabulary: these tokens, after the end of a text."""

    def __init__(self, tokens: str) -> None:
        super().__init__()
        self.tokens = ["<end>", *tokens.split()]
        self.size, self.bos, self.eos = len(self.tokens), None, 0

    def table(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def private(classes: int = 5) -> Setting:
    """A language model whose texts have private places, as ``extras["privacy"]``: scores from 0 to 1."""
    plain = tokens(classes)

    def batch(seed: int) -> Batch:
        drawn = torch.rand(2, SIZE, LENGTH, generator=torch.Generator().manual_seed(seed))
        return plain.batch(seed).replace(extras={"privacy": torch.where(drawn[0] < 0.4, drawn[1], 0.0)})

    return replace(plain, name="private", batch=batch, with_two_classes=lambda: private(2))


def several(classes: int = 5) -> Setting:
    """A language model with three teachers, which answer together."""
    plain = tokens(classes)

    def teacher() -> nn.Module:
        return nn.ModuleList(TextModel(width, 2, classes, pool=False) for width in (12, 10, 8))

    return replace(plain, name="several", teacher=teacher, with_two_classes=lambda: several(2))


def given(
    student: nn.Module | Maker, teacher: nn.Module | Maker | None, batch: Batch, data: DataInfo | None = None
) -> Setting:
    """A user's own pair and batch, on the CPU. Models are copied, so that checks leave the user's own alone."""
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None and not callable(model):
            raise ConfigError(
                "not a model",
                where=name,
                found=type(model).__name__,
                wanted="a torch module, or a function that makes one",
            )
    return Setting(
        "given",
        _maker(student),
        _maker(teacher if teacher is not None else student),
        lambda seed: batch.to("cpu"),
        data or DataInfo(),
        places=tuple(batch.mask.shape[1:]) if batch.mask is not None else (),
    )


def _maker(model: nn.Module | Maker) -> Maker:
    return (lambda: copy.deepcopy(model).cpu()) if isinstance(model, nn.Module) else model


def _ids(generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCABULARY, (SIZE, LENGTH), generator=generator)


def _spans(number: int, generator: torch.Generator) -> Tensor:
    """Which characters ``[B, T, 2]`` of texts of 14 characters so many tokens cover."""
    inner = torch.stack([1 + torch.randperm(13, generator=generator)[: number - 1] for _ in range(SIZE)])
    ends = torch.nn.functional.pad(inner.sort(dim=1).values, (0, 1), value=14)
    return torch.stack([torch.nn.functional.pad(ends[:, :-1], (1, 0)), ends], dim=2)


def _batch(
    seed: int, classes: int, inputs: Callable[[torch.Generator], Tensor], positions: tuple[int, ...] = ()
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(SAMPLES, generator=generator)[:SIZE]
    # Labels of samples are those the data set knows; labels of positions are free.
    labels = torch.randint(0, classes, (SIZE, *positions), generator=generator) if positions else index % classes
    return Batch(inputs(generator), labels=labels, index=index)


def _data(classes: int, batch: Callable[[int], Batch]) -> DataInfo:
    def batches() -> Iterator[Batch]:
        return (batch(seed) for seed in range(3))

    return DataInfo(SAMPLES, torch.arange(SAMPLES) % classes, classes, batches)
