"""Classifiers on all stages that tell class and turn together, and how the shallow ones learn from the deepest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import check_features, check_same_shape, widen
from limbeck.core.relations import project
from limbeck.objectives.parts.branches import BottleneckBranch, branch_points


def turned_labels(labels: Tensor | None, classes: int, turns: int) -> tuple[Tensor, Tensor]:
    """Labels of class and turn together, ``[K B, 1]``, turn after turn, and which rows have one.

    >>> import torch
    >>> joint, labelled = turned_labels(torch.tensor([1, -1]), 2, 2)
    >>> joint.squeeze(1).tolist(), labelled.tolist()
    ([2, 0, 3, 1], [True, False, True, False])
    """
    target, labelled = class_labels(labels, classes, "LSSKD")
    turn = target.new_tensor(range(turns)).repeat_interleave(len(target))
    return (target.repeat(turns) * turns + turn).unsqueeze(-1), labelled.repeat(turns)


def right_rows(logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of each row, 0 where it has no label."""
    return -soften(logits).gather(-1, target).squeeze(-1).masked_fill(~labelled, 0.0)


def taught_rows(
    own: Tensor, read: Tensor, deepest: Tensor, feature: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """What a shallow stage learns from the deepest, a row: its answer, and beta times its feature's squared distance.

    Args:
        own, deepest: Logits of equal shape; the deepest stage's are detached.
        read, feature: What their classifiers read, ``[N, D]``; the deepest stage's is detached.
    """
    check_same_shape(deepest, own, "joint_logits", "branch_logits")
    check_features(read, feature)
    distance = (widen(read) - widen(feature.detach())).square().sum(dim=-1)
    wanted = soften(deepest.detach(), temperature)
    return temperature**2 * kl_rows(wanted, soften(own, temperature)) + beta * distance


def stage_rows(
    branch_logits: Sequence[Tensor],
    branch_features: Sequence[Tensor],
    joint_logits: Tensor,
    feature: Tensor,
    labels: Tensor | None,
    size: int,
    classes: int,
    *,
    beta: float,
    temperature: float,
) -> Tensor:
    """What all stages learn of class and turn, and the shallow ones from the deepest, ``[K, B]``.

    Args:
        branch_logits, branch_features: One ``[K B, C K]`` and ``[K B, D]`` a shallow stage.
        joint_logits, feature: Of the deepest.
        labels: ``[B]``.
        size, classes: B and C.
        beta, temperature: As in ``taught_rows``.

    Raises:
        TensorError: Shapes that do not belong together.
    """
    turns = len(joint_logits) // max(size, 1)
    if joint_logits.shape != (turns * size, classes * turns) or not turns or len(branch_logits) != len(branch_features):
        raise TensorError(
            "not one row a turn and one entry a class and turn",
            where="joint_logits",
            found=f"{list(joint_logits.shape)}, {len(branch_logits)} branches with {len(branch_features)} features",
            wanted=f"[K x {size}, {classes} x K]",
        )
    joint, labelled = turned_labels(labels, classes, turns)
    total = right_rows(joint_logits, joint, labelled)
    for own, read in zip(branch_logits, branch_features, strict=True):
        total = total + right_rows(own, joint, labelled)
        total = total + taught_rows(own, read, joint_logits, feature, beta=beta, temperature=temperature)
    return total.view(turns, size)


def check_views(batch: Batch, turns: int, who: str) -> None:
    """Refuse a batch that has not so many views of each sample."""
    if batch.extras.get("views", 1) != turns:
        raise DataError(
            "these are not the turns of a batch",
            where=who,
            found=f"{batch.extras.get('views', 1)} views of each sample",
            wanted=str(turns),
            remedy="leave out what makes other views, or let Distiller prepare the batch",
        )


class StageClassifiers(nn.Module):
    """Bottleneck classifiers on shallow stages and a linear one beside the student's own.

    Args:
        features: Of the layers that may have one, shallow before deep.
        read: What the student's own classifier reads, ``[B, D]``.
        entries: Of each answer.

    Raises:
        ConfigError: No layer is shallower than the deepest.
    """

    def __init__(self, features: Sequence[Tensor], read: Tensor, entries: int) -> None:
        super().__init__()
        self.points = branch_points(features)
        if len(self.points) < 2:
            raise ConfigError("nothing is shallower than the deepest", where="tap", found=len(features))
        width, relu = read.shape[-1], bool((read >= 0).all())
        *shallow, deepest = (features[p] for p in self.points)
        self.heads = nn.ModuleList(BottleneckBranch(f, deepest, width, entries, relu).to(f.device) for f in shallow)
        self.joint = LinearProjector(width, entries).to(read.device)

    def forward(self, features: Sequence[Tensor], read: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Answers of the shallow stages, what they read, and the deepest one's answer."""
        chosen = (features[p] for p in self.points[:-1])
        pairs = [project(head, f, "student_feature") for head, f in zip(self.heads, chosen, strict=True)]
        return [answer for answer, _ in pairs], [own for _, own in pairs], self.joint(read)
