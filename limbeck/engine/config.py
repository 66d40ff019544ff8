"""How one stage trains: the only settings of the loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from limbeck.core.errors import ConfigError
from limbeck.engine.dot import DOT
from limbeck.engine.metrics import LOWER_IS_BETTER, headline
from limbeck.engine.optim import check_optimizer, check_schedule, optimizer_class

Monitor = Literal[
    "auto",
    "accuracy",
    "top5",
    "nll",
    "ece",
    "map_macro",
    "map_micro",
    "f1_macro",
    "f1_micro",
    "hamming",
    "mse",
    "mae",
    "total",
]

#: Settings that belong to a whole run: every stage must say the same.
SHARED = ("precision", "device", "deterministic", "trackers")
#: Settings that change neither a weight nor what a checkpoint holds: a resumed run may say something else.
FREE = ("log_every", "checkpoint_every", "checkpoint_minutes", "keep", "trackers")


def _known(name: str) -> str:
    try:
        optimizer_class(name)
    except ConfigError as error:
        raise ValueError(_without_place(error)) from None
    return name


def _schedule(value: Any) -> Any:
    try:
        check_schedule(value)
    except ConfigError as error:
        raise ValueError(_without_place(error)) from None
    return value


def _without_place(error: ConfigError) -> str:
    """The error as pydantic shows it, which says the place by itself."""
    return str(ConfigError(error.message, found=error.found, wanted=error.wanted, remedy=error.remedy))


class TrainConfig(BaseModel):
    """How one stage trains. Every setting has a default that trains a small classifier sensibly.

    Where the defaults come from: learning rate, momentum and weight decay of the CRD benchmark (SGD 0.05, 0.9, 5e-4;
    arXiv 1910.10699), and a cosine schedule in the place of its steps.

    >>> TrainConfig(steps=500, optimizer="adamw", lr=1e-3).epochs is None
    True
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    epochs: int | None = Field(default=10, ge=1, description="passes through the data; or say steps")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of epochs")

    optimizer: Annotated[str, AfterValidator(_known)] = Field(
        default="sgd",
        description="a class of torch.optim by name, package.module:Class, or dot: SGD with a momentum of its own for "
        "what comes from the teacher (options momentum, delta)",
    )
    lr: float = Field(default=0.05, gt=0, description="learning rate")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
    decay: Literal["weights", "all"] = Field(
        default="weights", description="what decays: weights of two or more dimensions, or biases and norms too"
    )
    optimizer_options: dict[str, Any] = Field(
        default_factory=dict, description="more options of the optimizer; sgd has momentum 0.9 unless this says else"
    )
    schedule: Annotated[Any, BeforeValidator(_schedule)] = Field(
        default="cosine",
        description="of the learning rate: constant, cosine, linear, step, {name: {option: value}} in parts of lr, or "
        "a class of torch.optim.lr_scheduler by name or package.module:Class, which counts in steps",
    )
    schedule_options: dict[str, Any] = Field(default_factory=dict, description="options of a scheduler class")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the steps over which lr rises from 0")
    clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    accumulate: int = Field(default=1, ge=1, description="micro-batches a process cuts its share of a step into")

    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="of products; weights stay fp32")
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto: an accelerator where there is one")
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="compile the step; auto: where it pays")
    channels_last: bool = Field(default=False, description="images with their channels innermost")
    deterministic: bool = Field(default=False, description="only operations that repeat on accelerators too; slower")

    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of averaged weights; they are what is kept")
    validate_epochs: int = Field(default=1, ge=1, description="epochs between validations")
    validate_steps: int | None = Field(default=None, ge=1, description="steps between validations, instead of epochs")
    monitor: Monitor = Field(
        default="auto",
        description="what validation judges by; auto: accuracy, map_macro of multi-label data, mse of regression; "
        "total: the stage's own loss",
    )
    patience: int | None = Field(default=None, ge=1, description="validations without a better one before it stops")
    select: Literal["last", "best"] = Field(default="last", description="which weights the stage ends with")

    log_every: int = Field(default=50, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int | None = Field(default=None, ge=1, description="steps between checkpoints")
    checkpoint_minutes: float | None = Field(default=10.0, ge=0, description="minutes between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept, beside the best")
    trackers: list[str] = Field(default_factory=list, description="of accelerate: tensorboard, wandb, mlflow ...")

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("steps") is not None:
            if data.get("epochs") is not None:
                raise ValueError("give epochs or steps, not both")
            return {**data, "epochs": None}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs or steps")
        try:
            check_optimizer(self.optimizer, self.optimizer_options)
            check_schedule(self.schedule, self.schedule_options)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.apart and (self.compile == "on" or self.precision == "fp16"):
            setting = "compile: on" if self.compile == "on" else "precision: fp16"
            raise ValueError(
                f"{self.optimizer} takes two gradients of every step apart, which {setting} does not allow"
            )
        return self

    @property
    def apart(self) -> bool:
        """Whether its optimizer wants the gradients of task and teacher apart."""
        return issubclass(optimizer_class(self.optimizer), DOT)

    def monitored(self, task: str) -> str:
        """The number that validation judges by on data of this task.

        >>> TrainConfig().monitored("multilabel")
        'map_macro'
        """
        return headline(task) if self.monitor == "auto" else self.monitor

    def lower_is_better(self, task: str) -> bool:
        """Whether the monitored number should fall."""
        return self.monitored(task) in LOWER_IS_BETTER

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Optimizer steps of the stage.

        Raises:
            ConfigError: Epochs of data whose length nobody knows.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if steps_per_epoch is None:
            raise ConfigError(
                "the length of this data is not known, so epochs cannot be counted", where="epochs", remedy="say steps"
            )
        if steps_per_epoch < 1:
            raise ConfigError("an epoch of this data has no step", where="data", remedy="lower batch_size")
        return self.epochs * steps_per_epoch

    def settled(self) -> dict[str, Any]:
        """Everything that the weights depend on, as plain values."""
        return self.model_dump(mode="json", exclude=set(FREE))
