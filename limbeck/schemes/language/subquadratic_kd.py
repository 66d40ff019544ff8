"""From a transformer to a student of linear cost: copy, align matrices, align hidden states, distil."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.models.subquadratic.teacher import Copy, check_student, copy_from
from limbeck.schemes.language.mixer_alignment import HiddenStates, MixingMatrices, tokens_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_MIXERS = ("*self_attn*",)


@register(
    Card(
        key="subquadratic_kd",
        name="To subquadratic students",
        title="Empirical Evaluation of Knowledge Distillation from Transformers to Subquadratic Language Models",
        year=2025,
        arxiv="2504.14366",
        knowledge="scheme",
        equation=r"\tfrac 1 {H L^2} \left\| M_S^l - A_T^l \right\|_F^2 \;\to\; "
        r"\tfrac 1 D \left\| f_S^l(h_T^{l-1}) - h_T^l \right\|_2^2 \;\to\; L",
        use="For a student whose cost grows with the length of a text and not with its square: linear attention, "
        "retention, GLA, Mamba-2 or mLSTM in the place of a Llama-style teacher's attention, in all layers or some. "
        "With cross_entropy and kd at temperature 1 for the last stage. In the paper xLSTM does best, GLA and MetaLA "
        "nearly so, kernels alone poorly; hidden states help most, copied projections and matrices a little.",
        defaults={
            "copied": "all: projections of queries, keys, values and outputs are copied, too",
            "mixing": "0.05 of the training, our choice; the paper gives no share",
            "hidden": "0.25, our choice",
        },
        evidence="reading",
        evidence_note="a student whose mixers are the teacher's attention is at zero in all three losses; matrices and "
        "recurrences agree to rounding",
        choices=(
            "losses and stages are those of MOHAWK (arXiv 2408.10189), whose names the paper uses; alignment stages "
            "train mixers alone, the last stage everything",
            "an error of matrices is divided by the number of each text's own tokens, so that padding changes nothing",
            "alignment counts every token of a text, also those of a prompt",
            "mixers have the teacher's number of heads and keep its projections' shapes, grouped keys and values among "
            "them, so that all of them can be copied; what they have beside those starts open (gates) or as the "
            "identity (convolutions)",
        ),
        tasks=("language",),
        cost="Matrices take the square of the length in the first stage, as the teacher's attention does.",
    )
)
class SubquadraticKD(Scheme):
    r"""Up to three stages: ``mixing``, ``hidden`` and ``distill``, after what can be copied has been copied.

    .. math:: L_{mix} = \frac 1 N \sum_l \frac{\| M_S^l - A_T^l \|_F^2}{H L^2}, \qquad
        L_{hid} = \frac 1 N \sum_l \frac{\| f_S^l(h_T^{l-1}) - h_T^l \|_2^2}{D}

    Each layer of the student reads what the teacher's layer reads. The last stage's loss is the recipe's. The student
    is one of :func:`limbeck.models.subquadratic.subquadratic`, of the teacher's sizes.

    Args:
        copied: ``all``, ``rest`` (all but the projections of mixers) or ``none``.
        mixing: Share of the training for matrices; 0: no such stage. Meanwhile the teacher attends in the way that
            transformers calls eager, so that it hands its attention maps out.
        hidden: Share for hidden states; 0: no such stage.

    Source: Empirical Evaluation of Knowledge Distillation from Transformers to Subquadratic Language Models, arXiv
    2504.14366; Transformers to SSMs (MOHAWK), arXiv 2408.10189.

    >>> SubquadraticKD(mixing=0.0).hidden
    0.25
    """

    def __init__(self, copied: Copy = "all", mixing: float = 0.05, hidden: float = 0.25) -> None:
        for name, value in (("mixing", mixing), ("hidden", hidden), ("mixing + hidden", mixing + hidden)):
            check_inside(value, f"scheme.{name}", closed=True)
        self.copied, self.mixing, self.hidden = copied, mixing, hidden

    def trainings(self, cast: Cast) -> Iterator[Training]:
        judge = cast.need_teacher("a student of linear cost is made from")
        check_student(cast.student)
        if not isinstance(judge, FrozenTeacher):
            raise ConfigError(
                "what a teacher's layers say can be asked only where it is a model at hand",
                where="teacher",
                found=type(judge).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        copy_from(cast.student, judge.model, self.copied)
        first, second, last = self.split(cast.config)
        stages, depth = [], int(cast.student.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        if first is not None:
            stages.append(Stage("mixing", LayerDistiller(cast, Terms.of(MixingMatrices(depth))), first, _MIXERS))
        if second is not None:
            stages.append(Stage("hidden", LayerDistiller(cast, Terms.of(HiddenStates(depth))), second, _MIXERS))
        if last is not None:
            stages.append(Stage("distill", Distiller(cast.student, cast.loss, judge, logits=cast.logits), last))
        yield Training(stages)

    def split(self, config: TrainConfig) -> tuple[TrainConfig | None, TrainConfig | None, TrainConfig | None]:
        """The settings of the stages there are; their lengths add up to the whole."""
        name = "steps" if config.steps is not None else "epochs"
        whole = getattr(config, name)
        shares = [self.mixing, self.hidden]
        lengths = [max(1, round(whole * share)) if share else 0 for share in shares]
        rest = whole - sum(lengths)
        if rest < (sum(shares) < 1):
            raise ConfigError(f"so many stages need more {name}", where=f"train.{name}", found=whole)
        found: list[TrainConfig | None] = [
            config.model_copy(update={name: length, "monitor": "auto"}) if length else None for length in lengths
        ]
        found.append(config.model_copy(update={name: rest}) if rest else None)
        return found[0], found[1], found[2]


class LayerDistiller(Distiller):
    """Lets each layer of the student read what the teacher's layer reads; see :class:`SubquadraticKD`."""

    def __init__(self, cast: Cast, loss: Terms) -> None:
        assert isinstance(cast.teacher, FrozenTeacher)
        judge = HandingOut(cast.teacher.model, logits=cast.teacher.where)
        super().__init__(cast.student, loss, judge, logits=cast.logits)
        self._taps = ()  # what the losses hear of the student is made by its layers, not by its forward

    def close(self) -> None:
        """Also leave the teacher as it was."""
        super().close()
        if isinstance(self.teacher, HandingOut):
            self.teacher.put_back()

    def made(self, batch: Batch) -> Batch:
        return batch.replace(extras={**batch.extras, "tokens": tokens_of(batch)})

    def traces(self, batch: Batch) -> tuple[Trace, Trace]:
        self._ready()
        teacher = self._teach(batch)
        student: Any = self.student
        tokens = tokens_of(batch)
        places = batch.inputs.get("position_ids")
        if places is None:
            places = _counted(tokens)
        said: dict[str, Any] = {}
        for number, layer in enumerate(student.model.layers):
            given = teacher[f"model.layers.{number}@in"].to(next(layer.parameters()).dtype)
            rotary = student.model.rotary(places)
            if f"mixing:{number}" in self.loss.student_taps:
                said[f"mixing:{number}"] = layer.self_attn.matrix(layer.input_layernorm(given), rotary, tokens)
            else:
                said[f"hidden:{number}"] = layer(given, rotary, tokens)[0]
        return Trace(None, said), teacher


def _counted(tokens: Any) -> Any:
    """Positions ``[1, L]`` from 0 on, as models count that are told none."""
    return tokens.new_ones(1, tokens.shape[1]).long().cumsum(dim=1) - 1


class HandingOut(FrozenTeacher):
    """A teacher that hands its attention maps out while it is attached to taps that ask for them."""

    way: str | None = None

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        config: Any = self.model.config
        if self.way is None and any(tap.endswith("self_attn[1]") for tap in taps):
            self.way = config._attn_implementation
            self.model.set_attn_implementation("eager")  # type: ignore[operator]
        super().attach(taps, batch)

    def put_back(self) -> None:
        """Attend as before."""
        if self.way is not None:
            self.model.set_attn_implementation(self.way)  # type: ignore[operator]
            self.way = None
