"""Masked feature distillation (MFD): from a masked image the student gives the teacher's feature of the whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import DataError
from limbeck.core.layers import LayerObjective
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import projector
from limbeck.core.reduction import Reduction, check_features, check_inside, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch, pooled, project, unit
from limbeck.core.teacher import teacher_inputs
from limbeck.core.trace import Trace
from limbeck.core.views import stack_views


def mfd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of two features of length 1, that of a masked image and that of the whole image.

    .. math:: L = \left\| \frac{f^S(\tilde x)}{\|f^S(\tilde x)\|} - \frac{f^T(x)}{\|f^T(x)\|} \right\|_2^2

    Args:
        student_feature: ``[B, D]``, of the masked images.
        teacher_feature: The same shape, of the whole images; detached.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes.

    Source:
        Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", 2023, arXiv 2307.12732.

    Example:
        >>> import torch
        >>> mfd_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor(2.)
    """
    check_features(student_feature, teacher_feature)
    gap = unit(widen(student_feature)) - unit(widen(teacher_feature.detach()))
    return reduce(gap.square().sum(dim=-1), mask, reduction)


def hide_patches(images: Tensor, ratio: float, grid: int) -> Tensor:
    """Images with this part of their patches set to 0, other patches in each image.

    Args:
        images: ``[B, C, H, W]``.
        ratio: The part that is hidden; what remains is rounded down to whole patches, and is one at least.
        grid: Patches along each side, or one for each pixel where that is fewer.
    """
    size = len(images), 1, min(grid, images.shape[2]), min(grid, images.shape[3])
    draws = torch.rand(size, device=images.device).flatten(1)
    rank = draws.argsort(dim=1).argsort(dim=1)
    kept = rank < max(int(draws.shape[1] * (1 - ratio)), 1)
    return images * F.interpolate(kept.view(size).to(images.dtype), images.shape[2:], mode="nearest")


@register(
    Card(
        key="mfd",
        name="MFD",
        title="CLIP-KD: An Empirical Study of CLIP Model Distillation",
        year=2023,
        arxiv="2307.12732",
        code="winycg/CLIP-KD",
        knowledge="feature",
        equation=r"\left\| \frac{f^S(\tilde x)}{\|f^S(\tilde x)\|} - \frac{f^T(x)}{\|f^T(x)\|} \right\|_2^2",
        use="For image encoders whose embedding counts, above all transformers: the student completes what is hidden.",
        defaults={
            "ratio": "0.75, the authors' setting",
            "grid": "14, as a transformer with patches of 16 cuts an image of 224",
            "clean": "True; False is the authors' code, where all is learned from masked images",
            "tap": "what enters the classifier; of CLIP its embedding",
        },
        evidence="parity",
        evidence_note="value and gradient of the feature loss of winycg/CLIP-KD@f3ae18b",
        choices=(
            "Hidden patches are 0 in the image; the authors' transformer leaves them out, which not every network can.",
            "So by default the student sees whole images beside, and answers for them too: a small convolutional "
            "network on digits came to 97 % in 60 steps with them, and to 66 % from masked images alone.",
            "The squared norm, as the paper writes it; the code's mean over 512 channels with weight 2000 is 4.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=4.0,
    ),
    mfd_loss,
)
class MFD(LayerObjective):
    """Masked feature distillation; see ``limbeck.functional.mfd_loss``.

    ``prepare`` hides patches of the images that the student sees; the teacher sees them whole.

    Args:
        tap: The feature; the mean of its places.
        teacher_tap: The teacher's, where it is called otherwise.
        ratio: The part of an image that is hidden.
        grid: Patches along each side of an image.
        clean: Show the student the whole images too, and take labels from them only.
    """

    contract = Contract(at_equal=None)
    projector: nn.Module | None

    def __init__(
        self,
        tap: str = "penultimate",
        teacher_tap: str | None = None,
        ratio: float = 0.75,
        grid: int = 14,
        clean: bool = True,
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_inside(ratio, "ratio")
        check_positive(grid, "grid")
        self.ratio, self.grid, self.clean, self.projector = ratio, grid, clean, None

    def prepare(self, batch: Batch) -> Batch:
        images = batch.inputs
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
            found = getattr(images, "dtype", type(images).__name__)
            raise DataError("patches of images are hidden", where="batch.inputs", found=found, wanted="[B, C, H, W]")
        masked, whole = hide_patches(images, self.ratio, self.grid), teacher_inputs(batch)
        if not self.clean:
            return batch.replace(inputs=masked, teacher_inputs=whole)
        return stack_views(batch.replace(teacher_inputs=whole), [images, masked])

    def _vectors(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        s, t = self.pair(student, teacher)
        check_same_batch(s, t, "student_feature", "teacher_feature")
        return pooled(s, name="student_feature")[0], pooled(t, name="teacher_feature")[0]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = self._vectors(student, teacher)
        self.projector = nn.Identity() if s.shape == t.shape else projector(s, t)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self._vectors(student, teacher)
        return mfd_loss(project(self.ready("projector"), s, "student_feature"), t)
