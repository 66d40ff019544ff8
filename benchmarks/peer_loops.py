"""Training loops in the form of two well-known projects, for ``cached_epoch.py``; each turn is a whole step.

Written anew from reading their code, since neither runs here as a whole: torchdistill's core (1.1.5) imports
torchvision, and mdistiller (commit a08d46f) is no package, and needs torchvision, tensorboardX and a GPU.

* ``torchdistill_style``: ``examples/torchvision/image_classification.py``, ``DistillationBox.forward_process`` and
  ``default_post_forward_process``: teacher first, models' values collected in dictionaries, ``KDLoss``, gradients
  cleared behind the step, a check of the loss, and a ``MetricLogger`` that asks for ``loss.item()`` at every step.
  ``KDLoss`` and ``MetricLogger`` are torchdistill's own where it is installed.
* ``mdistiller_style``: ``BaseTrainer.train_iter`` with the distiller ``KD``: student first, top-1 and top-5 accuracy
  and the loss put into average meters at every step, and a line for the progress bar made of them.

Both read samples one by one through a ``DataLoader`` with what torchvision's ``RandomCrop(32, padding=4)``,
``RandomHorizontalFlip``, ``ToTensor`` and ``Normalize`` do to a Pillow image.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from limbeck.data import normalisation

TEMPERATURE, TASK, SOFT = 4.0, 0.1, 0.9
PADDING, SIDE = 4, 32


class PerSample(Dataset[tuple[Any, ...]]):
    """Samples as torchvision's sets and transforms give them.

    Args:
        images: Arrays ``[H, W, 3]`` of bytes, or encoded images, which are decoded and resized at every reading.
        labels: Of each.
        last: What stands third in an item, by index.
    """

    def __init__(self, images: list[Any], labels: Tensor, last: Callable[[int], Any]) -> None:
        self.images, self.labels, self.last = images, labels.tolist(), last
        stats = normalisation("imagenet")
        self.mean, self.std = list(stats.mean), list(stats.std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        held = self.images[index]
        if isinstance(held, bytes):
            image = Image.open(io.BytesIO(held)).convert("RGB")
            if image.size != (SIDE, SIDE):
                image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BILINEAR)
        else:
            image = Image.fromarray(held)
        return self.view(image), self.labels[index], self.last(index)

    def view(self, image: Image.Image) -> Tensor:
        """Crop, flip, tensor, normalise."""
        image = ImageOps.expand(image, border=PADDING, fill=0)
        top, left = (int(torch.randint(0, 2 * PADDING + 1, size=(1,)).item()) for _ in range(2))
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).view(SIDE, SIDE, 3).permute(2, 0, 1).contiguous()
        floats = pixels.to(torch.float32).div(255).clone()
        mean, std = torch.as_tensor(self.mean), torch.as_tensor(self.std)
        if (std == 0).any():
            raise ValueError("a standard deviation is zero")
        return floats.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _sgd(student: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def torchdistill_style(
    student: nn.Module, teacher: nn.Module, images: list[Any], labels: Tensor, batch: int
) -> Iterator[None]:
    """torchdistill's loop; yields after every step."""
    data = PerSample(images, labels, lambda index: {})
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=0, collate_fn=_with_supplement)
    criterion, logger = _torchdistill_loss(), _torchdistill_logger()
    optimizer, device = _sgd(student), torch.device("cpu")
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    student_values: dict[str, dict[str, Any]] = {}
    teacher_values: dict[str, dict[str, Any]] = {}
    optimizer.zero_grad()
    for epoch in count():
        teacher.eval()
        student.train()
        for inputs, targets, _ in logger.log_every(loader, 100, f"Epoch: [{epoch}]"):
            start = time.time()
            inputs, targets = inputs.to(device), targets.to(device)
            with torch.no_grad():
                said = teacher(inputs)
            teacher_found = {**_collected(teacher_values), ".": {"output": said}}
            answered = student(inputs)
            student_found = {**_collected(student_values), ".": {"output": answered}}
            loss = sum([1.0 * criterion(student_found, teacher_found, targets)])
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logger.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
            logger.meters["img/s"].update(len(inputs) / (time.time() - start))
            if torch.isnan(loss) or torch.isinf(loss):
                raise ValueError(f"the training loop was broken due to loss = {loss}")
            yield


def _with_supplement(items: list[tuple[Any, ...]]) -> Any:
    inputs, targets, _ = zip(*items, strict=True)
    return torch.stack(inputs), torch.tensor(targets), {}


def _collected(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What hooks left behind, taken out of their dictionary; plain KD sets none."""
    return {path: {kind: each.pop(kind) for kind in list(each)} for path, each in values.items()}


def installed() -> str:
    """Which parts of torchdistill are its own."""
    if _own("losses.mid_level") is None or _own("misc.log") is None:
        return "none"
    return f"KDLoss and MetricLogger of torchdistill {version('torchdistill')}"


def _own(module: str) -> Any:
    try:
        return import_module(f"torchdistill.{module}")
    except ImportError:
        return None


def _torchdistill_loss() -> Callable[..., Tensor]:
    module = _own("losses.mid_level")
    if module is None:
        return _kd_loss
    return module.KDLoss(".", "output", ".", "output", temperature=TEMPERATURE, alpha=TASK, beta=SOFT)


def _kd_loss(student: dict[str, Any], teacher: dict[str, Any], targets: Tensor) -> Tensor:
    answered, said = student["."]["output"], teacher["."]["output"]
    log_q, p = (answered / TEMPERATURE).log_softmax(dim=1), (said / TEMPERATURE).softmax(dim=1)
    soft = F.kl_div(log_q, p, reduction="batchmean")
    return TASK * F.cross_entropy(answered, targets) + SOFT * TEMPERATURE**2 * soft


def _torchdistill_logger() -> Any:
    module = _own("misc.log")
    if module is None:
        return _Logger()
    logger = module.MetricLogger(delimiter="  ")
    logger.add_meter("lr", module.SmoothedValue(window_size=1, fmt="{value}"))
    logger.add_meter("img/s", module.SmoothedValue(window_size=10, fmt="{value}"))
    return logger


class _Smoothed:
    """A window of values and their sum."""

    def __init__(self, window: int = 20) -> None:
        self.window: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.window.append(value)
        self.total, self.count = self.total + value, self.count + 1


class _Logger:
    """Meters by name, and the time of data and steps."""

    def __init__(self) -> None:
        self.meters = {"lr": _Smoothed(1), "img/s": _Smoothed(10), "loss": _Smoothed()}

    def update(self, **values: float) -> None:
        for name, value in values.items():
            self.meters[name].update(value)

    def log_every(self, batches: DataLoader[Any], every: int, header: str) -> Iterator[Any]:
        took, waited, end = _Smoothed(), _Smoothed(), time.time()
        for number, batch in enumerate(batches):
            waited.update(time.time() - end)
            yield batch
            took.update(time.time() - end)
            if number % every == 0:
                _ = f"{header} [{number}/{len(batches)}] " + " ".join(
                    f"{name}: {torch.tensor(list(m.window)).median().item():.4f}" for name, m in self.meters.items()
                )
            end = time.time()


class _Average:
    """A running mean."""

    def __init__(self) -> None:
        self.sum, self.count, self.avg = 0.0, 0, 0.0

    def update(self, value: Any, n: int = 1) -> None:
        self.sum, self.count = self.sum + value * n, self.count + n
        self.avg = self.sum / self.count


def mdistiller_style(
    student: nn.Module, teacher: nn.Module, images: list[Any], labels: Tensor, batch: int
) -> Iterator[None]:
    """mdistiller's loop; yields after every step."""
    data = PerSample(images, labels, lambda index: index)
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=0)
    optimizer = _sgd(student)
    for epoch in count(1):
        meters = {name: _Average() for name in ("training_time", "data_time", "losses", "top1", "top5")}
        student.train()
        teacher.eval()
        for item in loader:
            optimizer.zero_grad()
            start = time.time()
            inputs, target, _ = item
            meters["data_time"].update(time.time() - start)
            inputs = inputs.float()
            answered = student(inputs)
            with torch.no_grad():
                said = teacher(inputs)
            log_q, p = (answered / TEMPERATURE).log_softmax(dim=1), (said / TEMPERATURE).softmax(dim=1)
            soft = F.kl_div(log_q, p, reduction="none").sum(1).mean() * TEMPERATURE**2
            losses = {"loss_ce": TASK * F.cross_entropy(answered, target), "loss_kd": SOFT * soft}
            loss = sum(value.mean() for value in losses.values())
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()
            meters["training_time"].update(time.time() - start)
            top1, top5 = _accuracy(answered, target)
            meters["losses"].update(loss.cpu().detach().numpy().mean(), len(inputs))
            meters["top1"].update(top1[0], len(inputs))
            meters["top5"].update(top5[0], len(inputs))
            _ = f"Epoch:{epoch}|" + "|".join(f" {name}:{float(meter.avg):.4f}" for name, meter in meters.items())
            yield


@torch.no_grad()
def _accuracy(output: Tensor, target: Tensor) -> list[Tensor]:
    _, guessed = output.topk(5, 1, True, True)
    correct = guessed.t().eq(target.reshape(1, -1).expand(5, -1))
    return [correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / len(target)) for k in (1, 5)]
