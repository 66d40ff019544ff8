"""The guide's scripts for other trainers run as they stand, and learn the same where they say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer

import limbeck.functional as LF
from limbeck.integrations.transformers import DistillationTrainer
from tests.data.language.texts import LINES
from tests.integrations.parts import Ordered, arguments, bpe, llama, weights

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
SECTION = GUIDE.partition("## In your own trainer\n")[2].partition("\n## ")[0]
SCRIPT, LIGHTNING, LOOP = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the script names: student, teacher and texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = bpe()
    for name, width in (("student", 16), ("teacher", 24)):
        llama(width, 300, width).save_pretrained(name)
        tokenizer.save_pretrained(name)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 4))
    return tmp_path


def test_the_script_runs_as_it_stands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in SCRIPT.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(lines) <= 15
    quick = SCRIPT.replace("max_steps=100", "max_steps=2, use_cpu=True, report_to='none', disable_tqdm=True")
    assert quick != SCRIPT
    given: dict[str, Any] = {}
    exec(quick, given)
    trainer = given["trainer"]
    assert isinstance(trainer, DistillationTrainer)
    assert isinstance(trainer, Trainer)
    assert trainer.state.global_step == 2
    small = AutoModelForCausalLM.from_pretrained("small")
    assert torch.equal(weights(small), weights(trainer.model))
    assert not torch.equal(weights(small), weights(AutoModelForCausalLM.from_pretrained("student")))


@pytest.mark.parametrize("loss", ["jsd", {"jsd": {"weight": 1, "beta": 0.1}}, {"skew_kl": 1.0}, {"fused_kl": {}}])
def test_any_objective_goes_by_its_name(loss: Any, here: Path) -> None:
    quick = SCRIPT.replace("max_steps=100", "max_steps=1, use_cpu=True, report_to='none', disable_tqdm=True")
    named = re.sub(r"loss=\{.*?\}, .*", f"loss={loss!r},", quick)
    assert named != quick
    exec(named, {})


def test_the_loop_learns_what_the_trainer_does(tmp_path: Path) -> None:
    tokenizer = bpe()
    rows = [{"input_ids": tokenizer(line)["input_ids"]} for line in LINES * 4]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    student, teacher = llama(16, 300, 1).double(), llama(24, 300, 2).double()
    batches = [collate(rows[i : i + 4]) for i in range(0, 16, 4)]
    steps = [[dict(batch) for batch in batches[:2]], [dict(batch) for batch in batches[2:]]]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    exec(LOOP, {"torch": torch, "student": student, "teacher": teacher, "steps": steps, "optimizer": optimizer})
    trainer = Ordered(
        model=llama(16, 300, 1).double(),
        teacher=teacher,
        loss={"cross_entropy": 0.5, "reverse_kl": 0.5},
        args=arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
    )
    trainer.train()
    assert torch.allclose(weights(student), weights(trainer.model), atol=1e-8)
    assert "LF." in LOOP
    assert callable(LF.reverse_kl_loss)


@pytest.mark.filterwarnings("ignore")
def test_the_module_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    student, teacher = nn.Linear(8, 3), nn.Linear(8, 3)
    before, inputs = weights(student), torch.randn(32, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8)
    exec(LIGHTNING, {"student": student, "teacher": teacher, "loader": loader, "lightning": lightning})
    assert not torch.equal(before, weights(student))
    assert (tmp_path / "small" / "model.safetensors").is_file()
