"""Models by text: the zoo, callables, folders of transformers, other libraries, and what mistakes are told."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core.errors import MissingExtra, ModelError
from limbeck.models import load_model, save_weights

MODULE = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, in_channels=3, num_classes=10, bias=True):
        super().__init__(in_channels, num_classes, bias)

def plain(width):
    return nn.Linear(width, width)

def number():
    return 3

def broken():
    raise ValueError("no luck\\nat all")

ready = nn.Linear(2, 2)
text = "text"

class Box:
    make = Net
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "bad_nets.py").write_text("raise RuntimeError('not today')")
    (tmp_path / "needy_nets.py").write_text("import surely_absent_package")
    monkeypatch.chdir(tmp_path)
    for name in ("own_nets", "bad_nets", "needy_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_zoo_name_with_weights(tmp_path: Path) -> None:
    net = load_model("resnet8", num_classes=4, in_channels=1)
    save_weights(net, tmp_path / "student.safetensors")
    again = load_model("resnet8", num_classes=4, in_channels=1, weights=tmp_path)
    assert torch.equal(net.conv1.weight, again.conv1.weight)
    assert load_model("vit_mini", image_size=8, patch_size=2, in_channels=1).pos_embed.shape[1] == 17


def test_a_module_is_handed_through(tmp_path: Path) -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_weights(other, tmp_path / "net.safetensors")
    assert load_model(net, num_classes=2) is net
    assert load_model(net, weights=tmp_path / "net.safetensors") is net
    assert torch.equal(net.weight, other.weight)
    with pytest.raises(ModelError, match="takes no depth"):
        load_model(net, depth=3)


def test_callables(here: Path) -> None:
    net = load_model("own_nets:Net", num_classes=4, in_channels=5, image_size=8, bias=False)
    assert (net.in_features, net.out_features, net.bias) == (5, 4, None)
    assert load_model("own_nets:plain", num_classes=4, width=3).in_features == 3
    assert load_model("own_nets:Box.make").out_features == 10
    assert load_model("own_nets:ready") is load_model("own_nets:ready")
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("own_nets:Nett", {}, "did you mean 'Net'"),
        ("own_nets:number", {}, "returned no model; found int"),
        ("own_nets:text", {}, "no callable; found str"),
        ("own_nets:broken", {}, "raised ValueError: no luck"),
        ("own_nets:plain", {"widht": 3}, "raised TypeError: .*widht"),
        ("own_nets:ready", {"width": 3}, "takes no width"),
        ("own_nets:Net", {"auto": "AutoModel"}, "takes no auto"),
        ("bad_nets:Net", {}, "importing it raised RuntimeError: not today"),
        ("needy_nets:Net", {}, "no module 'surely_absent_package'"),
        ("no_nets:Net", {}, "no module 'no_nets'"),
        (":Net", {}, "importing it raised ValueError"),
        ("resnet2", {}, "6n"),
        ("resnet20", {"pretrained": True}, "takes no pretrained"),
        ("resnett", {}, "did you mean 'resnet"),
        ("qqq", {}, "a zoo name, package.module:callable"),
        (".", {}, "no config.json"),
        ("./absent.folder", {}, "no such model"),
    ],
)
def test_mistakes_are_told_in_one_line(here: Path, spec: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


class TestTransformers:
    def test_the_class_is_that_of_the_configuration(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        import transformers

        x = torch.randn(2, 1, 8, 8)
        wanted = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        capfd.readouterr()
        for spec in (str(folder), folder, f"hf:{folder}"):
            net = load_model(spec, num_classes=4).eval()
            assert type(net) is type(wanted)
            assert torch.equal(net(x).logits, wanted(x).logits)
        assert capfd.readouterr() == ("", "")

    def test_auto_options_and_fresh_weights(self, folder: Path) -> None:
        net = load_model(folder, auto="AutoModelForImageClassification", attn_implementation="eager")
        assert net.config._attn_implementation == "eager"
        fresh = load_model(folder, auto="AutoModelForImageClassification", pretrained=False, num_hidden_layers=1)
        assert len(fresh.vit.layers if hasattr(fresh.vit, "layers") else fresh.vit.encoder.layer) == 1
        assert type(load_model(folder, pretrained=False)) is type(net)

    def test_a_new_last_layer_is_said(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="limbeck"):
            net = load_model(folder, num_classes=7)
        assert net(torch.randn(2, 1, 8, 8)).logits.shape == (2, 7)
        assert "classifier.bias, classifier.weight start at random" in caplog.text

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"auto": "AutoModelForImageClasification"}, "did you mean 'AutoModelForImageClassification'"),
            ({"auto": "AutoTokenizer"}, "no such model class"),
            ({"hiden_size": 3}, "hiden_size"),
            ({"hidden_size": 32}, "of another shape: .*cls_token"),
            ({"num_hidden_layers": 3}, "missing: vit"),
            ({"trust_remote_code": True}, "runs no code"),
        ],
    )
    def test_mistakes(self, folder: Path, options: dict[str, object], said: str) -> None:
        with pytest.raises(ModelError, match=said):
            load_model(folder, **options)

    def test_damaged_folders(self, folder: Path, tmp_path: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(ModelError, match="raised OSError"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match="building it raised"):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ModelError, match="building it raised"):
            load_model(tmp_path)

    def test_a_name_that_cannot_be_reached(self) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(ModelError, match="surely/absent"):
            load_model("hf:surely/absent")


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_missing_extras(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=f"{package!r} is not installed"):
        load_model(spec)


def test_what_timm_and_torchvision_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is needed, so what is checked here is the call, against their documented signatures."""
    asked: list[tuple[object, ...]] = []

    def create_model(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append((name, pretrained, options))
        return nn.Identity()

    def get_model(name: str, weights: str | None = None, **options: object) -> nn.Module:
        asked.append((name, weights, options))
        return nn.Identity()

    timm, torchvision, models = (types.ModuleType(n) for n in ("timm", "torchvision", "torchvision.models"))
    vars(timm).update(create_model=create_model)
    vars(models).update(get_model=get_model)
    for module in (timm, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    load_model("timm:vit_tiny", num_classes=4, in_channels=1, drop_rate=0.1)
    load_model("timm:vit_tiny", pretrained=True)
    load_model("torchvision:resnet18", num_classes=4, in_channels=3, pretrained=True)
    load_model("torchvision:resnet18")
    assert asked == [
        ("vit_tiny", False, {"num_classes": 4, "in_chans": 1, "drop_rate": 0.1}),
        ("vit_tiny", True, {}),
        ("resnet18", "DEFAULT", {"num_classes": 4}),
        ("resnet18", None, {}),
    ]
    with pytest.raises(ModelError, match="three channels; found 1"):
        load_model("torchvision:resnet18", in_channels=1)
    with pytest.raises(ModelError, match="takes no auto"):
        load_model("timm:vit_tiny", auto="AutoModel")
