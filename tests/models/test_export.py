"""Export: what was written is loaded by its own readers and computes what the student computes."""

import importlib
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import MissingExtra, ModelError
from limbeck.models import create, load_weights
from limbeck.models import export as module
from limbeck.models.export import export
from limbeck.models.student import describe_inputs, example_inputs, load_student, read_student, save_student


@pytest.fixture
def student() -> nn.Module:
    model = create("resnet8", num_classes=4, in_channels=1)
    with torch.no_grad():
        model(torch.randn(16, 1, 8, 8))  # batch norms that have seen something
    return model


@pytest.fixture
def run(tmp_path, student):
    """A run's folder, as far as its student goes."""
    folder = tmp_path / "run"
    inputs = describe_inputs(torch.zeros(2, 1, 8, 8))
    save_student(
        student, folder / "student", model="resnet8", options={"num_classes": 4, "in_channels": 1}, inputs=inputs
    )
    return folder


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def tokens(samples: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (samples, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, inputs) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def run_onnx(folder, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]


def test_safetensors_from_a_run_needs_no_data(run, student, tmp_path):
    facts = export(run, "safetensors", tmp_path / "out")
    assert facts["max_difference"] <= facts["tolerance"] == 1e-6
    assert facts["parameters"] == sum(p.numel() for p in student.parameters())
    again = load_student(tmp_path / "out")
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(logits(again, images), logits(student, images))
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "student.json"]
    assert read_student(tmp_path / "out")["model"] == "resnet8"


def test_a_student_made_by_hand_gives_its_weights(tmp_path, student):
    export(student, "safetensors", tmp_path, Batch(torch.randn(3, 1, 8, 8)))
    with pytest.raises(ModelError, match="load_weights"):
        load_student(tmp_path)
    again = create("resnet8", num_classes=4, in_channels=1)
    load_weights(again, tmp_path)
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(logits(again, images), logits(student, images))


def test_onnx_runs_on_any_batch_and_is_silent(tmp_path):
    options = {"num_classes": 4, "in_channels": 1, "image_size": 8}
    student = create("mlp_8", **options)
    inputs = describe_inputs(torch.zeros(2, 1, 8, 8))
    save_student(student, tmp_path / "run", model="mlp_8", options=options, inputs=inputs)
    script = f"from limbeck.models.export import export; export({str(tmp_path / 'run')!r}, 'onnx', {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
    for size in (1, 2, 7):
        images = torch.randn(size, 1, 8, 8)
        found = run_onnx(tmp_path, {"inputs": images})
        np.testing.assert_allclose(found, logits(student, images).numpy(), atol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_transformer_keeps_its_names_and_takes_any_length(bert, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = export(bert, "onnx", tmp_path, tokens())
    assert facts["max_difference"] <= facts["tolerance"] == 1e-4
    longer = tokens(3, 14)
    np.testing.assert_allclose(run_onnx(tmp_path, longer), logits(bert, longer).numpy(), atol=1e-5)


def test_transformers_folder_loads_by_from_pretrained(bert, tmp_path, capfd):
    import transformers

    facts = export(bert, "transformers", tmp_path, tokens())
    assert facts["max_difference"] == 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inputs = tokens(2)
    assert torch.equal(logits(again, inputs), logits(bert, inputs))


def test_transformers_export_is_silent(bert, tmp_path, capfd):
    export(bert, "transformers", tmp_path, tokens())
    assert capfd.readouterr() == ("", "")


def test_other_students_make_no_transformers_folder(student, tmp_path):
    with pytest.raises(ModelError, match="only a transformers model.*ResNet.*safetensors or onnx"):
        export(student, "transformers", tmp_path, torch.randn(2, 1, 8, 8))
    assert os.listdir(tmp_path) == []


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + torch.randn(3)


class Branching(Noisy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) if x.sum() > 0 else self.head(-x)


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_what_does_not_equal_the_student_is_not_written(form, tmp_path):
    (tmp_path / "model.onnx").write_text("of yesterday")
    with pytest.raises(ModelError, match="does not compute what the student does.*apart"):
        export(Noisy(), form, tmp_path, torch.randn(2, 4))
    assert (tmp_path / "model.onnx").read_text() == "of yesterday"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_model_onnx_has_no_words_for_is_one_readable_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be written as ONNX") as error:
        export(Branching(), "onnx", tmp_path, torch.randn(2, 4))
    assert len(str(error.value)) < 500
    assert os.listdir(tmp_path) == []


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path, student):
    real = importlib.import_module

    def without(name, *args):
        if name == "onnxscript":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(module.importlib, "import_module", without)
    with pytest.raises(MissingExtra, match="onnxscript.*limbeck\\[export\\]"):
        export(student, "onnx", tmp_path, torch.randn(2, 1, 8, 8))


def test_mode_and_weights_of_the_student_are_left_alone(student, tmp_path):
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    export(student, "safetensors", tmp_path, torch.randn(1, 1, 8, 8))
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_made_up_inputs_have_the_shapes_described():
    inputs = (
        torch.zeros(2, 3),
        {"ids": torch.zeros(2, 5, dtype=torch.int32), "mask": torch.ones(2, 5, dtype=torch.bool)},
    )
    again = example_inputs(json.loads(json.dumps(describe_inputs(inputs))))
    assert again[0].shape == (2, 3)
    assert (again[1]["ids"].dtype, again[1]["mask"].dtype) == (torch.int32, torch.bool)


def test_mistakes_are_named(tmp_path, student, run):
    with pytest.raises(ModelError, match="no such form.*did you mean 'onnx'"):
        export(student, "onx", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="example"):
        export(student, "onnx", tmp_path)
    with pytest.raises(ModelError, match="no student is here"):
        export(tmp_path / "nowhere", "onnx", tmp_path)
    (run / "student" / "student.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        export(run, "onnx", tmp_path)
    (run / "student" / "student.json").write_text("[1]")
    with pytest.raises(ModelError, match="describes no student"):
        export(run, "onnx", tmp_path)
