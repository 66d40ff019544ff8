"""What the Trainer writes: a plain student, and beside it, in checkpoints, what objectives learned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from limbeck.core.errors import CheckpointError
from limbeck.integrations.transformers import OBJECTIVES, DistillationTrainer
from tests.data.language.texts import LINES
from tests.integrations.parts import arguments, bert, bpe, weights

LOSS = {"cross_entropy": 1.0, "tinybert": {"weight": 0.5}}


def trainer(folder: Path, loss: Any = None, **options: Any) -> DistillationTrainer:
    """A classifier with dropout and a projector, in random order."""
    tokenizer = bpe()
    data = [{**tokenizer(line), "labels": i % 3} for i, line in enumerate(LINES * 4)]
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 7,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    student, teacher = (bert(width, seed, attn_implementation="eager") for width, seed in ((16, 1), (24, 2)))
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        loss=loss or LOSS,
        args=arguments(folder, **(settings | options)),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def helpers(trained: DistillationTrainer) -> dict[str, torch.Tensor]:
    assert trained.distiller is not None
    return trained.distiller.loss.state_dict()


def test_a_resumed_training_ends_at_the_same_bits(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    torch.rand(17)  # another random state: what the checkpoint holds must be taken
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.state.global_step == 7
    assert torch.equal(weights(resumed.model), weights(straight.model))
    own, wanted = helpers(resumed), helpers(straight)
    assert own
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)


def test_helpers_train_and_lie_in_checkpoints_alone(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    trained.train()
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / OBJECTIVES) for step in (3, 6))
    assert first.keys() == helpers(trained).keys()
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert any(name.endswith("weight") for name in moved)
    plain = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert plain.keys() <= trained.model.state_dict().keys()
    trained.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / OBJECTIVES).exists()


def test_the_student_loads_where_limbeck_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer(tmp_path, save_strategy="no")
    trained.train()
    trained.save_model(str(tmp_path / "student"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "limbeck"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    text = AutoTokenizer.from_pretrained(tmp_path / "student")("Bread and salt", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model.eval()(**text).logits, trained.model.eval()(**text).logits, atol=1e-5)
    assert torch.equal(weights(model), weights(trained.model))


def test_a_checkpoint_without_helpers_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=3).train()
    place = tmp_path / "checkpoint-3"
    tensors = load_file(place / OBJECTIVES)
    (place / OBJECTIVES).unlink()
    with pytest.raises(CheckpointError, match="helpers are not those"):
        trainer(tmp_path).train(resume_from_checkpoint=str(place))
    save_file({name: torch.zeros(2, 2) for name in tensors}, place / OBJECTIVES)
    with pytest.raises(CheckpointError, match="helpers are not those"):
        trainer(tmp_path).train(resume_from_checkpoint=str(place))
    (place / OBJECTIVES).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=OBJECTIVES):
        trainer(tmp_path).train(resume_from_checkpoint=str(place))


def test_the_given_optimizer_learns_helpers_too(tmp_path: Path) -> None:
    trained = trainer(tmp_path, save_strategy="no")
    given = torch.optim.SGD(trained.model.parameters(), lr=0.01)
    trained.optimizer = given
    trained.create_optimizer()
    before = {name: value.clone() for name, value in helpers(trained).items()}
    trained.train()
    assert any(not torch.equal(before[name], value) for name, value in helpers(trained).items())
    known = {id(p) for group in given.param_groups for p in group["params"]}
    assert {id(p) for p in trained.distiller.parameters()} == known  # type: ignore[union-attr]


def test_training_twice_goes_on(tmp_path: Path) -> None:
    trained = trainer(tmp_path, save_strategy="no", max_steps=2)
    trained.train()
    once, own = weights(trained.model), {name: value.clone() for name, value in helpers(trained).items()}
    trained.train()
    assert not torch.equal(weights(trained.model), once)
    assert any(not torch.equal(own[name], value) for name, value in helpers(trained).items())
    groups = trained.optimizer.param_groups
    flat = [id(p) for group in groups for p in group["params"]]
    assert len(flat) == len(set(flat))
