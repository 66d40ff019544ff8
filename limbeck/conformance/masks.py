"""Checks of what must not matter: masked places, padding, missing labels, order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import Change, Outcome, Scene, evaluate, tensors_of
from limbeck.core.batch import map_tensors


def _maskless(case: Case) -> str | None:
    return None if case.contract.mask else "it does not declare that it honours a mask"


@check(_maskless, after=("value",))
def mask(case: Case) -> None:
    """What stands at masked places changes neither value, gradient nor state, however much padding there is."""
    counts = case.mask
    scene = case.scene().change(mask=counts)
    wanted = evaluate(case.objective(scene), scene)
    _same(wanted, _poisoned(case, scene, ~counts), "other values at masked places")
    if counts.ndim > 1 and not any(_is_map(t, counts) for t in _all(scene)):
        _same(wanted, _padded_positions(case, scene, counts), "two more masked positions")
    _same(wanted, _padded_samples(case, scene, counts), "two more masked samples")
    none = scene.change(mask=torch.zeros_like(counts))
    empty = evaluate(case.objective(scene), none)
    require(empty.value.item() == 0, f"with nothing that counts the loss is {empty.value.item()}, not 0")
    require(not any(bool(g.any()) for g in empty.student), "with nothing that counts there is a gradient")


def _unlabelless(case: Case) -> str | None:
    labels = case.batch().labels
    if case.contract.normalizer != "labels" or labels is None or labels.is_floating_point():
        return "its mean does not run over labels"
    return None


@check(_unlabelless, after=("value",))
def unlabelled(case: Case) -> None:
    """A place without a label (-100) does not count."""
    scene = case.scene()
    labels = scene.batch.require("labels")
    gone = torch.rand(labels.shape, generator=torch.Generator().manual_seed(7)) < 0.5
    gone.view(-1)[0], gone.view(-1)[-1] = False, True
    scene = scene.change(labels=labels.masked_fill(gone, -100))
    wanted = evaluate(case.objective(scene), scene)
    poison = _poison(gone)
    _same(wanted, evaluate(case.objective(scene), scene.change(poison, poison)), "other values where no label is")
    none = evaluate(case.objective(scene), scene.change(labels=torch.full_like(labels, -100)))
    require(none.value.item() == 0, f"with no label at all the loss is {none.value.item()}, not 0")


def _orderly(case: Case) -> str | None:
    return None if case.contract.permutation else "it is declared to depend on the order"


@check(_orderly, after=("value",))
def permutation(case: Case) -> None:
    """The order of the samples does not matter."""
    scene = case.scene()
    order = torch.randperm(scene.batch.size, generator=torch.Generator().manual_seed(2))
    wanted, found = (evaluate(case.objective(scene), s) for s in (scene, scene.take(order)))
    require(
        torch.allclose(wanted.value, found.value, rtol=1e-9, atol=1e-12),
        f"in another order the loss is {found.value.item():.10g} instead of {wanted.value.item():.10g}",
    )
    for a, b in zip(wanted.student, found.student, strict=True):
        if a.shape[:1] == order.shape:
            same = torch.allclose(_taken(a, order), b, rtol=1e-6, atol=1e-10)
            require(same, "in another order the gradient is another")


def _same(wanted: Outcome, found: Outcome, why: str) -> None:
    require(
        torch.allclose(wanted.value, found.value, rtol=1e-9, atol=1e-12),
        f"{why}: the loss went from {wanted.value.item():.8g} to {found.value.item():.8g}",
    )
    for a, b in zip(wanted.student, found.student, strict=True):
        kept = b[tuple(slice(0, n) for n in a.shape)]
        require(torch.allclose(a, kept, rtol=1e-6, atol=1e-10), f"{why}: the gradient changed")
        require(bool(torch.isclose(b.norm(), kept.norm())), f"{why}: a gradient reaches what does not count")
    for name, value in wanted.state.items():
        require(torch.equal(value, found.state[name]), f"{why}: the objective's own {name} changed")


def _poisoned(case: Case, scene: Scene, gone: Tensor) -> Outcome:
    poison, labels = _poison(gone), scene.batch.labels
    if labels is not None and labels.shape[: gone.ndim] == gone.shape and not labels.is_floating_point():
        other = (labels + 1) % (case.setting.classes or int(labels.max()) + 1)
        labels = torch.where(gone.reshape(gone.shape + (1,) * (labels.ndim - gone.ndim)), other, labels)
    return evaluate(case.objective(scene), scene.change(poison, poison, labels=labels))


def _poison(gone: Tensor) -> Change:
    """Large numbers where a mask over places says so: rows of tokens, channel-first maps, queries of attention maps."""

    def change(tensor: Tensor) -> Tensor:
        where = gone
        channel_first = gone.ndim > 2 and tensor.ndim == gone.ndim + 1 and tensor.shape[2:] == gone.shape[1:]
        if channel_first or _is_map(tensor, gone):
            where = gone[:, None]
        elif tensor.shape[: gone.ndim] != gone.shape:
            return tensor
        where = where.reshape(where.shape + (1,) * (tensor.ndim - where.ndim)).expand(tensor.shape)
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)).to(tensor.dtype)
        return torch.where(where, 50 * noise, tensor)

    return change


def _is_map(tensor: Tensor, places: Tensor) -> bool:
    """Attention maps ``[B, heads, T, T]`` beside a mask ``[B, T]``."""
    return places.ndim == 2 and tensor.ndim == 4 and tuple(tensor.shape[2:]) == (places.shape[1],) * 2


def _padded_positions(case: Case, scene: Scene, counts: Tensor) -> Outcome:
    def longer(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != counts.shape:
            return tensor
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool  # numbers of something: of nothing here
        return torch.cat([tensor, torch.full_like(tensor[:, :2], -1 if whole else 3)], dim=1)

    labels = scene.batch.labels
    if labels is not None and labels.shape[:2] == counts.shape:
        labels = torch.cat([labels, torch.zeros_like(labels[:, :2])], dim=1)
    mask = torch.cat([counts, torch.zeros_like(counts[:, :2])], dim=1)
    extras = map_tensors(scene.batch.extras, longer)
    return evaluate(case.objective(scene), scene.change(longer, longer, labels=labels, mask=mask, extras=extras))


def _padded_samples(case: Case, scene: Scene, counts: Tensor) -> Outcome:
    """The first two samples again, as padding; a bank's rows of theirs must not be touched twice, so with other ids.

    Where ``prepare`` made several views of the batch, each of them is padded.
    """
    size, whole = case.batch().size, torch.arange(scene.batch.size)
    views = whole.view(-1, size) if len(whole) % size == 0 else whole.unsqueeze(0)
    rows = torch.cat([views, views[:, :2]], dim=1)
    more, mask, index = scene.take(rows.flatten()), counts[rows], scene.batch.index
    mask[:, -2:] = False
    if index is not None:
        index = index[rows]
        if case.setting.data.samples:
            index[:, -2:] = torch.tensor([i for i in range(case.setting.data.samples) if i not in index][:2])
        index = index.flatten()
    found = evaluate(case.objective(scene), more.change(mask=mask.flatten(0, 1), index=index))
    order = torch.arange(rows.numel()).view_as(rows)
    order = torch.cat([order[:, :-2].flatten(), order[:, -2:].flatten()])  # what was added comes last, as `_same` wants
    return replace(found, student=[_taken(gradient, order) for gradient in found.student])


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """Some samples of a gradient, as ``Scene.take`` has it."""
    if tuple(tensor.shape) == (len(rows),) * 2:
        return tensor[rows][:, rows]
    return tensor[rows] if tensor.shape[:1] == rows.shape else tensor


def _all(scene: Scene) -> list[Tensor]:
    return tensors_of(scene.student) + tensors_of(scene.teacher)
