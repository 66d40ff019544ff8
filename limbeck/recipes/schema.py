"""What a recipe may say, with types and defaults. YAML is only its file form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.schedules import Schedule, parse_schedule
from limbeck.data.tasks import TASKS, task_of
from limbeck.engine.config import TrainConfig
from limbeck.models.heads import common_options, one_head

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}$"

#: Settings of training that are taken over from one another together or not at all.
_BELONG = (("epochs", "steps"), ("optimizer", "optimizer_options"), ("schedule", "schedule_options"))


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversions (``"5"`` is no number), no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Named(Section):
    """A name with options, as recipes write it: ``name``, or ``{name: {option: value}}``."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def written(self) -> Any:
        """The form in a recipe."""
        return {self.name: self.options} if self.options else self.name


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
        if options is None or isinstance(options, dict):
            return Named(name=str(name), options=options or {})
    if isinstance(value, Named):
        return value
    raise ValueError("must be a name, or {name: {option: value}} with one name")


_NAMED_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["object", "null"]},
        },
    ]
}
OneNamed = Annotated[Named, BeforeValidator(_named), WithJsonSchema(_NAMED_SCHEMA)]
OneNamedOrNone = Annotated[
    Named | None,
    BeforeValidator(lambda value: None if value is None else _named(value)),
    WithJsonSchema({"anyOf": [*_NAMED_SCHEMA["anyOf"], {"type": "null"}], "default": None}),
]


class Data(Section):
    """Where samples come from, and how they reach the models."""

    source: str = Field(
        description="'digits', a file or folder of Parquet, a folder of classes, 'hf:NAME', 'package.module:function'"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of that kind of source, such as size, mode, image, label, validation"
    )
    samples: int | None = Field(
        default=None, ge=1, description="train on this many only, taken evenly from the classes; default all"
    )
    batch_size: int = Field(
        default=64, ge=1, description="samples of one optimizer step, over all processes and micro-batches"
    )
    augment: list[Any] = Field(
        default_factory=list, description="in the order applied: names, or {name: {option: value}}"
    )
    normalize: str | dict[str, list[float]] | None = Field(
        default=None, description="a name, or {mean: [...], std: [...]}; default the source's own"
    )
    views: int | None = Field(
        default=None,
        ge=1,
        description="views of a sample: epoch e shows view e modulo this; default the cache's, else ever new ones",
    )
    view_seed: int | None = Field(
        default=None, ge=0, description="of the views; default the cache's, else the recipe's seed"
    )
    per_read: int = Field(
        default=1, ge=1, description="views of a sample that stand in one batch; it is decoded once for all of them"
    )


class Model(Section):
    """A model, as ``limbeck.load_model`` takes it."""

    model: str = Field(
        description="a name of limbeck's zoo, 'package.module:callable', a transformers folder, 'hf:NAME', 'timm:NAME' "
        "or 'torchvision:NAME'"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="handed to the model's builder")
    weights: str | None = Field(default=None, description="file or folder of weights, read strictly")
    auto: str | None = Field(default=None, description="transformers class, such as AutoModelForImageClassification")
    pretrained: bool | None = Field(default=None, description="start from the source's own weights")
    logits: str | None = Field(
        default=None, description="where logits stand in the output: a key, attribute or position"
    )
    head: OneNamedOrNone = Field(
        default=None,
        description="in the place of the last linear layer: 'subclass', 'dual', 'reused', or {NAME: {option: value}}; "
        "default what the loss wants, 'linear' for none",
    )


class TeacherModel(Model):
    """The model to learn from: with weights, or trained first; or the cache of what it said."""

    model: str = Field(default="", description="as the student's; may be left out where there is a cache")
    cache: str | None = Field(
        default=None,
        description="folder of its answers, made by limbeck cache build; the model is then neither loaded nor run",
    )
    train: TrainConfig | None = Field(
        default=None, description="train it on the labels first; what this does not say is as in the recipe's own train"
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="train it on this many samples only; default all there are, whatever data.samples says",
    )
    seed: int = Field(
        default=0, ge=0, description="of its training; apart from the recipe's, so that seeds share one teacher"
    )
    untrained: bool = Field(
        default=False, description="its random weights are meant: the control for what a teacher adds"
    )

    @model_validator(mode="after")
    def _is_there(self) -> TeacherModel:
        if not self.model and self.cache is None:
            raise ValueError("must name a model, or the folder of a cache")
        return self


class Term(BaseModel):
    """One term of the loss: its weight, and the method's own options beside it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    weight: Annotated[Any, WithJsonSchema({"type": ["number", "object"]})] = Field(
        default=1.0, description="a number, or a schedule such as {linear: {start: 1, end: 0}}"
    )
    method: str | None = Field(default=None, description="its method, where the term's name is not the method's")

    @property
    def options(self) -> dict[str, Any]:
        """The method's options."""
        return self.model_extra or {}

    def schedule(self) -> Schedule:
        """Its weight."""
        return parse_schedule(self.weight, "weight")


def _term(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"weight": value}
    if isinstance(value, (dict, Term)):
        return value
    raise ValueError("must be a weight, or {weight: ..., option: ...}")


Weighted = Annotated[Term, BeforeValidator(_term)]


def _loss(value: Any) -> Any:
    if isinstance(value, str):
        return usual(value) if value in catalogue.methods() else {value: {}}  # an unknown name is told with the terms
    if not isinstance(value, dict) or not value:
        raise ValueError("must be a method's name, or {method: weight, ...}")
    return value


def usual(method: str, task: str = "classification") -> dict[str, Any]:
    """A bare method's name as the sum its card calls usual.

    Args:
        method: Its key.
        task: What the labels mean; the loss on labels beside a method is the task's own.

    >>> import limbeck.objectives
    >>> usual("kd")
    {'cross_entropy': 0.1, 'kd': 0.9}
    >>> usual("rkd", "multilabel")
    {'binary_cross_entropy': 1.0, 'rkd': 1.0}
    """
    card = catalogue.get(method).card
    weight = card.weight
    swap = task != "classification"  # what most cards mean
    labels = {task_of(task).control if swap and key in _CONTROLS else key: w for key, w in card.with_labels.items()}
    return {**labels, card.key: {"weight": weight.written()} if isinstance(weight, Schedule) else weight}


_CONTROLS = frozenset(task.control for task in TASKS.values())


def usual_terms(method: str, task: str = "classification") -> dict[str, Term]:
    """The same sum as terms."""
    return {name: Term.model_validate(_term(value)) for name, value in usual(method, task).items()}


def usual_head(terms: dict[str, Term]) -> Named | None:
    """The head that a loss wants its student to have, with the options that they have in common.

    Raises:
        ConfigError: Two methods want different ones.

    >>> usual_head({"lelp": Term(subclasses=4)}).written()
    {'subclass': {'subclasses': 4}}
    """
    wanted = []
    for name, term in terms.items():
        method = catalogue.methods().get(term.method or name)
        if method is not None and method.card.head is not None:
            head = method.card.head
            wanted.append((name, {head: common_options(head, {**method.preset, **term.options})}))
    found = one_head(wanted)
    return None if found is None else _named(found)


def usual_scheme(loss: Any) -> Named:
    """The scheme that goes with a loss where none is said: a bare method's own, else the offline one."""
    known = isinstance(loss, str) and loss in catalogue.methods()
    return Named(name=catalogue.get(loss).card.scheme if known else "offline")


def _trained_alike(teacher: TeacherModel, train: TrainConfig) -> TeacherModel:
    """A teacher whose own training, where it has one, takes over from another what it does not say."""
    if teacher.train is None:
        return teacher
    own, settings = teacher.train.model_dump(exclude_unset=True), train.model_dump(exclude_unset=True)
    for chosen in _BELONG:  # another optimizer has other options
        if set(chosen) & set(own):
            settings = {key: value for key, value in settings.items() if key not in chosen}
    own = {key: value for key, value in own.items() if value is not None}
    return teacher.model_copy(update={"train": TrainConfig(**{**settings, **own})})


def _other_names(value: Any) -> Any:
    if isinstance(value, dict) and "teacher" in value:
        raise ValueError("the name teacher is the section teacher's own; take another")
    return value


class Recipe(Section):
    """A whole run: data, teacher, student, what is learned, how, and from which seed.

    >>> recipe = Recipe(data=Data(source="digits"), student=Model(model="resnet8"), loss="kd", teacher=None)
    >>> {name: term.weight for name, term in recipe.loss.items()}
    {'cross_entropy': 0.1, 'kd': 0.9}
    """

    name: str = Field(default="run", pattern=_NAME, description="of the run, its folder and its report")
    data: Data
    teacher: TeacherModel | None = None
    teachers: Annotated[dict[str, TeacherModel], BeforeValidator(_other_names)] = Field(
        default_factory=dict,
        description="further teachers by name, for schemes of several; without a teacher, they together are it",
    )
    student: Model
    players: dict[str, Model] = Field(
        default_factory=dict, description="further models by name that the scheme asks for, such as assistants or peers"
    )
    loss: Annotated[dict[str, Weighted], BeforeValidator(_loss)] = Field(
        description="a method's name for its usual sum, or {method: weight}, {method: {weight: ..., option: ...}}"
    )
    scheme: OneNamed = Field(default_factory=lambda: Named(name="offline"), description="who teaches whom, and when")
    train: TrainConfig = Field(default_factory=lambda: TrainConfig.model_validate({}))
    seed: int = Field(default=0, ge=0, description="of the student's start, the data's order and its views")
    plugins: list[str] = Field(
        default_factory=list, description="modules (package.module) or files (my_method.py) that register methods"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        """A bare method's name stands for its scheme too, where none is said."""
        if isinstance(data, dict) and "scheme" not in data and isinstance(data.get("loss"), str):
            return {**data, "scheme": usual_scheme(data["loss"])}
        return data

    @model_validator(mode="after")
    def _teacher_trains_alike(self) -> Recipe:
        """What a teacher's training does not say is as in the student's."""
        if self.teacher is not None:
            self.teacher = _trained_alike(self.teacher, self.train)
        self.teachers = {name: _trained_alike(teacher, self.train) for name, teacher in self.teachers.items()}
        return self

    @model_validator(mode="after")
    def _head_for_the_loss(self) -> Recipe:
        """The student's head, where none is said, is what the loss wants."""
        head = usual_head(self.loss) if self.student.head is None else None
        if head is not None:
            self.student = self.student.model_copy(update={"head": head})
        return self

    @property
    def staff(self) -> dict[str, TeacherModel]:
        """All its teachers by name, the one of the section ``teacher`` first; who comes first is who is reported on."""
        return {**({} if self.teacher is None else {"teacher": self.teacher}), **self.teachers}

    def written(self) -> dict[str, Any]:
        """As plain values that make the same recipe again, every default written out."""
        plain = self.model_dump(mode="json", exclude_none=True)
        plain["scheme"] = self.scheme.written()
        for name in ("players", "teachers"):
            if not plain[name]:
                del plain[name]
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None and model.head is not None:
                plain[name]["head"] = model.head.written()
        for name, model in self.teachers.items():
            if model.head is not None:
                plain["teachers"][name]["head"] = model.head.written()
        plain["loss"] = {
            name: (term["weight"] if set(term) == {"weight"} and not isinstance(term["weight"], dict) else term)
            for name, term in plain["loss"].items()
        }
        return plain
