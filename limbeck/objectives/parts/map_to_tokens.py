"""A student's map beside a transformer's attention and tokens."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.layout import patch_tokens, resize, to_map, to_tokens, unfused
from limbeck.core.objective import Objective
from limbeck.core.projectors import ConvProjector, GroupedLinear
from limbeck.core.relations import check_same_batch
from limbeck.core.trace import Trace


class MapToTokens(Objective):
    """What objectives start from that lead a convolutional student to a transformer.

    Args:
        tap: The student's layer, or a role: of its layers the one whose resolution is nearest to the teacher's patches.
        teacher_tap: The teacher's tokens.
        attention: The teacher's attention, by number: its queries, keys and values are tapped.
        more: Other taps of both.
    """

    def __init__(self, tap: str, teacher_tap: str, attention: int, more: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.tap, self.teacher_tap = tap, teacher_tap
        self.qkv = tuple(f"{role}:{attention}" for role in ("queries", "keys", "values"))
        self.student_taps, self.teacher_taps = (tap, *more), (teacher_tap, *self.qkv, *more)
        self.crossing: nn.Module | None = None

    def learn(self, own: Tensor, goal: Tensor, width: int, kernel: int) -> None:
        """Make the two projectors: to queries, keys and values of a width, and to the teacher's tokens.

        Args:
            own, goal: Maps, as ``features`` gives them.
            width: Of each query.
            kernel: Of the convolution that makes queries, keys and values; it has a bias where it is wider than 1.
        """
        channels, size = own.shape[1], (goal.shape[2], goal.shape[3])
        self.crossing = ConvProjector(channels, 3 * width, kernel, padding=kernel // 2, bias=kernel > 1).to(own.device)
        self.grouped = GroupedLinear(channels, goal.shape[1], size).to(own.device)

    def projected(self, own: Tensor) -> tuple[list[Tensor], Tensor]:
        """The student's queries, keys and values, and its tokens."""
        crossed = to_tokens(self.ready("crossing")(own))
        return list(crossed.chunk(3, dim=2)), to_tokens(self.grouped(own))

    def features(self, student: Trace, teacher: Trace) -> tuple[Tensor, list[Tensor], Tensor]:
        """The student's map at the teacher's resolution; the teacher's queries, keys and values; its tokens as a map.

        A class token is left out. The teacher's carry no gradient.
        """
        goal = to_map(teacher[self.teacher_tap].detach(), "teacher_feature")
        size = (goal.shape[2], goal.shape[3])
        found = student[self.tap]
        maps = [to_map(f, "student_feature") for f in (found if isinstance(found, list) else [found])]
        gaps = [abs(m.shape[2] * m.shape[3] - size[0] * size[1]) for m in maps]
        nearest = maps[gaps.index(min(gaps))]
        check_same_batch(nearest, goal, "student_feature", "teacher_feature")
        qkv = [patch_tokens(t.detach()) for t in unfused(*(teacher[tap] for tap in self.qkv))]
        for tensor, tap in zip(qkv, self.qkv, strict=True):
            check_same_batch(nearest, tensor, "student_feature", tap)
        return resize(nearest, size), qkv, goal
