"""A client of FedLGD: images of its own, distilled from its samples, and the pull towards the server's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.hashing import key
from limbeck.core.taps import Listener
from limbeck.data.augment import Augment
from limbeck.data.resident import ResidentLoader
from limbeck.engine.device import make_accelerator
from limbeck.schemes.data_free.contrast import supervised_contrast
from limbeck.schemes.federated import virtual
from limbeck.schemes.federated.clients import Work
from limbeck.schemes.federated.local import Round, learn, seeded
from limbeck.schemes.federated.owners import Owners, of_labels
from limbeck.schemes.federated.wire import Tensors, below, under
from limbeck.schemes.scheme import Cast

Pull = Literal["contrastive", "mmd", "l2"]
Start = Literal["normal", "real"]
_NETS, _ORDER = 66, 67  # keep these draws apart from others


@dataclass(frozen=True)
class Virtual:
    """How virtual images are made and learned from; see :class:`~limbeck.schemes.federated.fedlgd.FedLGD`."""

    epochs: int
    images: int
    server_images: int
    warm_up: int
    match_steps: int
    server_steps: int
    every: int
    times: int
    weight: float
    pull: Pull
    temperature: float
    lr_images: float
    real: int
    start: Start
    augment: tuple[str, ...]

    def renews(self, number: int) -> bool:
        """Whether images are made anew in a round, whose loss is plain then."""
        return number % self.every == 0 and number <= self.every * self.times


def noise(labels: Tensor, means: Tensor, deviations: Tensor, shape: torch.Size) -> Tensor:
    """Images of noise with the mean and deviation of their class and channel."""
    wide = (len(labels), shape[0], *[1] * (len(shape) - 1))
    return means[labels].view(wide) + deviations[labels].view(wide) * torch.randn(len(labels), *shape)


def some_of_each(labels: Tensor, most: int) -> Tensor:
    """Places of at most so many samples of each class, drawn anew.

    >>> some_of_each(torch.tensor([0, 1, 0, 0, 1]), 1).shape
    torch.Size([2])
    """
    order = torch.randperm(len(labels), device=labels.device)
    order = order[labels[order].argsort(stable=True)]
    ranked = labels[order]
    first = torch.searchsorted(ranked, ranked)
    return order[torch.arange(len(labels), device=labels.device) - first < most]


class Anchored(Distiller):
    """A client's model, which is pulled towards what it makes of the server's images.

    Args:
        given, more: As of a distiller.
        anchors: The server's images, with labels.
        scheme: How it is pulled.
    """

    def __init__(self, *given: Any, anchors: Batch, scheme: Virtual, **more: Any) -> None:
        super().__init__(*given, also=("penultimate",), **more)
        self.anchors, self.scheme = anchors, scheme

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        student, teacher = self.traces(batch)
        losses = self.compare(student, teacher, batch)
        anchors = self._ready()(self.anchors.inputs)["penultimate"].flatten(1)
        labels, theirs, scheme = batch.require("labels"), self.anchors.require("labels"), self.scheme
        features = student["penultimate"].flatten(1)
        if scheme.pull == "contrastive":
            rows, groups = torch.cat([features, anchors]), torch.cat([labels, theirs])
            value = supervised_contrast(rows, groups, scheme.temperature)
        elif scheme.pull == "mmd":
            value = virtual.kernel_distance(features, anchors)
        else:
            classes = int(theirs.max()) + 1
            value = virtual.matching_loss(anchors, theirs, features, labels, classes)
        losses.total = losses.total + scheme.weight * value
        losses.terms["anchors"], losses.weights["anchors"] = value.detach(), value.new_tensor(scheme.weight)
        return losses


class VirtualWork(Work):
    """A client of FedLGD: keeps its own images and the server's."""

    hears = ("weights", "images")
    says = ("weights", "means", "deviations", "present")

    def __init__(self, cast: Cast, owners: Owners, scheme: Virtual) -> None:
        self.model, self.loss, self.owners, self.scheme = copy.deepcopy(cast.student), of_labels(cast), owners, scheme
        self.fresh, self.logits = cast.another, cast.logits
        first = owners.loaders[0]
        self.shape, self.classes = first.example(1).inputs.shape[1:], first.classes or 0
        self.anchor_labels = torch.arange(self.classes).repeat_interleave(scheme.server_images)

    def labels(self, number: int) -> Tensor:
        """Of a client's virtual images: so many of each class that it has."""
        loader = self.owners.loaders[number]
        assert loader.labels is not None
        assert loader.only is not None
        return loader.labels[loader.only].unique().cpu().repeat_interleave(self.scheme.images)

    def begin(self, number: int) -> Tensors:
        images, anchors = (torch.zeros(len(y), *self.shape) for y in (self.labels(number), self.anchor_labels))
        return {"images": images, "anchors": anchors, "begun": torch.tensor(0), "anchored": torch.tensor(0)}

    def answer(self, number: int, kept: Tensors, told: Tensors, place: Round) -> tuple[Tensors, Tensors]:
        scheme, labels, said = self.scheme, self.labels(number), dict[str, Tensor]()
        images, anchors = kept["images"], told.get("images", kept["anchors"])
        anchored = bool(kept["anchored"]) or "images" in told
        self.model.load_state_dict(below("weights", told))
        with seeded(place.seed, place.number, number):
            if not kept["begun"]:
                said = self.statistics(number)
                images = self.drawn(number, labels, said)
                nets = partial(self.net, number)
                images = self.distilled(number, images, labels, nets, scheme.warm_up, place)
            elif scheme.renews(place.number):
                images = self.distilled(number, images, labels, lambda _: self.model, scheme.match_steps, place)
            pulled = anchored and bool(scheme.weight) and not scheme.renews(place.number)
            self.train(number, images, labels, anchors if anchored else None, pulled, place)
        keeps = {"images": images, "anchors": anchors, "begun": torch.tensor(1), "anchored": torch.tensor(anchored)}
        return keeps, {**under("weights", self.model.state_dict()), **said}

    def own(self, number: int) -> tuple[Tensor, Tensor]:
        """A client's samples as they are."""
        batches = list(self.owners.loaders[number].bare().batches())
        return torch.cat([b.inputs for b in batches]).cpu(), torch.cat([b.require("labels") for b in batches]).cpu()

    def statistics(self, number: int) -> Tensors:
        """Mean and deviation of a client's pixels, by class and channel ``[C, channels]``, and which classes it has."""
        x, y = self.own(number)
        moments = torch.cat([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1)
        means, squares = virtual.means_by_class(moments, y, self.classes).chunk(2, dim=1)
        present = torch.bincount(y, minlength=self.classes) > 0
        return {"means": means, "deviations": (squares - means.square()).clamp(min=0).sqrt(), "present": present}

    def drawn(self, number: int, labels: Tensor, found: Tensors) -> Tensor:
        """Where a client's virtual images begin."""
        if self.scheme.start == "normal":
            return noise(labels, found["means"], found["deviations"], self.shape)
        x, y = self.own(number)
        rows = [torch.multinomial((y == c).float(), self.scheme.images, replacement=True) for c in labels.unique()]
        return x[torch.cat(rows)]

    def net(self, number: int, step: int) -> nn.Module:
        """A random net, another for each client and step."""
        return self.fresh(key(_NETS, number, step) >> 33)

    def distilled(
        self, number: int, images: Tensor, labels: Tensor, nets: Callable[[int], nn.Module], steps: int, place: Round
    ) -> Tensor:
        """Virtual images whose mean features in some nets are those of the client's samples."""
        device = make_accelerator(place.config).device
        (x, y), labels = (t.to(device) for t in self.own(number)), labels.to(device)
        images = images.to(device).clone().requires_grad_()
        optimizer = torch.optim.SGD([images], lr=self.scheme.lr_images, momentum=0.5)
        net: nn.Module | None = None
        for step in range(steps):
            wanted = nets(step)
            if wanted is not net:
                net = copy.deepcopy(wanted).to(device).requires_grad_(False)
                listener, net = Listener(net, ("penultimate",), x[:2]), wanted
                listener.model.train()
            rows = some_of_each(y, self.scheme.real)
            real, made = virtual.same_view([x[rows], images], self.scheme.augment)
            with torch.no_grad():
                wished = listener(real)["penultimate"].flatten(1)
            felt = listener(made)["penultimate"].flatten(1)
            loss = virtual.matching_loss(wished, y[rows], felt, labels, self.classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return images.detach().cpu()

    def train(
        self, number: int, images: Tensor, labels: Tensor, anchors: Tensor | None, pulled: bool, place: Round
    ) -> None:
        """A client's epochs on its own virtual images and the server's."""
        build: Callable[..., Distiller] = Distiller
        if anchors is not None:
            device = make_accelerator(place.config).device
            beside = Batch(anchors.to(device), self.anchor_labels.to(device))
            build = partial(Anchored, anchors=beside, scheme=self.scheme) if pulled else Distiller
            images, labels = torch.cat([images, anchors]), torch.cat([labels, self.anchor_labels])
        size = self.owners.loaders[number].batch_size
        order = key(_ORDER, place.seed, number) >> 33
        shared: dict[str, Any] = {"augment": Augment(()), "seed": order, "classes": self.classes, "drop_last": False}
        loader = ResidentLoader(images, labels, batch_size=min(size, len(labels)), **shared)
        learn(self.model, self.loss, loader, place, epochs=self.scheme.epochs, logits=self.logits, build=build)
