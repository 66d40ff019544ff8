"""The models of the CRD table equal the authors' code: parameters, names and outputs for the same weights.

``golden/repdistiller.npz`` holds numbers only, with the repository, the commit and the call that gave them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.models import create, load_weights, parameters

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden" / "repdistiller.npz", allow_pickle=False)
_spec = importlib.util.spec_from_file_location("fill", HERE / "fill.py")
assert _spec
assert _spec.loader
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)

PARAMETERS = {  # with 100 classes
    "resnet8": 83892,
    "resnet14": 181108,
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet44": 667188,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
    "ResNet18": 11220132,
    "ResNet50": 23705252,
    "wrn_16_1": 180916,
    "wrn_16_2": 703284,
    "wrn_40_1": 569780,
    "wrn_40_2": 2255156,
    "vgg8": 3965028,
    "vgg11": 9277284,
    "vgg13": 9462180,
    "vgg16": 14774436,
    "vgg19": 20086692,
    "mobilenetv2": 812836,
    "shufflenetv1": 949258,
    "shufflenetv2": 1355528,
}
LARGE = {"ResNet50", "vgg11", "vgg16", "vgg19", "resnet32x4"}
NAMED = [key.removeprefix("names/") for key in GOLDEN.files if key.startswith("names/")]


def test_where_the_numbers_come_from() -> None:
    assert str(GOLDEN["repository"]) == "HobbitLong/RepDistiller"
    assert str(GOLDEN["commit"]) == "b84f547c5db6a35318d4671d7d5c4de74c822403"
    assert {key.removeprefix("logits/") for key in GOLDEN.files if key.startswith("logits/")} == set(PARAMETERS)
    assert len(NAMED) == 7


@pytest.mark.parametrize("name", PARAMETERS)
def test_same_parameters(name: str) -> None:
    with torch.device("meta"):
        net = create(name, num_classes=100)
    assert parameters(net) == PARAMETERS[name] == int(GOLDEN[f"parameters/{name}"])


@pytest.mark.parametrize("name", [n if n not in LARGE else pytest.param(n, marks=pytest.mark.slow) for n in PARAMETERS])
def test_same_outputs(name: str) -> None:
    net = fill.fill(create(name, num_classes=100))
    x = fill.images()
    with torch.no_grad():
        for mode, wanted in ((False, GOLDEN[f"logits/{name}"]), (True, GOLDEN[f"train/{name}"])):
            found = net.train(mode)(x).numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMED)
def test_published_checkpoints_load_by_name(name: str, tmp_path: Path) -> None:
    """A file with the authors' own names and nesting, values in their order, gives the authors' outputs."""
    own = fill.fill(create(name, num_classes=100)).state_dict()
    names = [str(key) for key in GOLDEN[f"names/{name}"]]
    assert (names == list(own)) == (name in ("shufflenetv1", "ResNet18"))
    state = {f"module.{key}": tensor for key, tensor in zip(names, own.values(), strict=True)}
    torch.save({"epoch": 240, "model": state}, tmp_path / "ckpt.pth")
    net = create(name, num_classes=100).double()
    assert load_weights(net, tmp_path / "ckpt.pth") == ([], [])
    with torch.no_grad():
        found = net.eval()(fill.images()).numpy()
    wanted = GOLDEN[f"logits/{name}"]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
