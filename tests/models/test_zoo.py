"""Every model of the zoo: shapes, gradients, names, state, compilation, and what mistakes are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import ModelError
from limbeck.models import available, create, load_weights, parameters, save_weights

HEAVY = ("ResNet34", "vgg16", "vit_small", "resnet32x4", "resnet110")  # others of their families stand for them
IMAGES = [name for name in available() if not name.startswith("text")]
LIGHT = [name for name in IMAGES if name not in HEAVY]
# one of each family, the lightest
FAMILIES = ["resnet8", "resnet20_a", "resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
FAMILIES += ["mlp", "vit_mini"]


@pytest.mark.parametrize("name", [n if n not in HEAVY else pytest.param(n, marks=pytest.mark.slow) for n in IMAGES])
def test_logits_of_colour_images(name: str) -> None:
    net = create(name, num_classes=7).eval()
    with torch.no_grad():
        two = net(torch.randn(2, 3, 32, 32))
        one = net(torch.randn(1, 3, 32, 32))
    assert two.shape == (2, 7)
    assert one.shape == (1, 7)
    assert two.isfinite().all()
    assert not torch.equal(two[0], two[1])


@pytest.mark.parametrize("name", LIGHT)
def test_logits_of_digits(name: str) -> None:
    net = create(name, num_classes=10, in_channels=1, image_size=8)
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert net.eval()(torch.randn(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    net = create(name, in_channels=1, image_size=16).eval().double()
    x = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    net = create(name, num_classes=4, in_channels=1, image_size=16)
    net(torch.randn(4, 1, 16, 16)).square().sum().backward()
    idle = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a convolution's bias before batch normalisation has no effect, so its gradient is only rounding
    assert not idle


@pytest.mark.parametrize("name", FAMILIES)
def test_state_goes_to_a_file_and_back(name: str, tmp_path: object) -> None:
    net = create(name, num_classes=4, in_channels=1, image_size=16).train()
    x = torch.randn(4, 1, 16, 16)
    net(x)  # moves the running statistics
    save_weights(net, f"{tmp_path}/net.safetensors")
    again = create(name, num_classes=4, in_channels=1, image_size=16)
    assert load_weights(again, f"{tmp_path}/net.safetensors") == ([], [])
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert torch.equal(net.eval()(x), again.eval()(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_module_overwrites_what_a_tap_captured(name: str) -> None:
    net = create(name, in_channels=1, image_size=16).eval()
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(key: str):
        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            captured[key] = (output, output.clone())

        return hook

    for key, module in net.named_modules():
        module.register_forward_hook(keep(key))
    with torch.no_grad():
        net(torch.randn(2, 1, 16, 16))
    assert len(captured) > 3
    assert not [key for key, (now, then) in captured.items() if not torch.equal(now, then)]


@pytest.mark.parametrize("name", ["resnet8", "vit_mini"])
def test_exports_as_one_graph(name: str) -> None:
    net = create(name, in_channels=1, image_size=16).eval()
    x = torch.randn(2, 1, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), net(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8_a", "shufflenetv2"])
def test_compiles_without_a_break(name: str) -> None:
    net = create(name, in_channels=1, image_size=16).eval()
    x = torch.randn(2, 1, 16, 16)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_stages_have_the_resolutions_they_should() -> None:
    wanted = {
        "resnet20": {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
        "resnet8x4": {"conv1": (32, 32), "layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)},
        "ResNet18": {"layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8), "layer4": (512, 4)},
        "wrn_16_2": {"layer1": (32, 32), "layer2": (64, 16), "layer3": (128, 8)},
        "vgg8": {"layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8), "layer4": (512, 4), "layer5": (512, 4)},
        "mobilenetv2": {
            "conv1": (16, 16),
            "layer2": (12, 16),
            "layer3": (16, 8),
            "layer5": (48, 4),
            "layer7": (160, 2),
        },
        "shufflenetv1": {"layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)},
        "shufflenetv2": {"layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4)},
    }
    for name, stages in wanted.items():
        net, shapes = create(name).eval(), {}
        for stage in stages:
            net.get_submodule(stage).register_forward_hook(
                lambda _m, _a, out, stage=stage, shapes=shapes: shapes.update({stage: tuple(out.shape[1:3])})
            )
        with torch.no_grad():
            net(torch.zeros(1, 3, 32, 32))
        assert shapes == stages, name


def test_attention_maps_are_probabilities() -> None:
    net = create("vit_mini", in_channels=1, image_size=8, patch_size=2).eval()
    maps: list[torch.Tensor] = []
    for block in net.blocks:
        block.attn.probs.register_forward_hook(lambda _m, _a, out: maps.append(out))
    net(torch.randn(2, 1, 8, 8))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 17, 17)] * 4
    for probs in maps:
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 17))


def test_vgg_pools_once_more_for_large_images() -> None:
    small, large = create("vgg8", image_size=32), create("vgg8", image_size=64)
    assert isinstance(small.pool4, nn.Identity)
    assert isinstance(large.pool4, nn.MaxPool2d)


def test_depthwise_convolutions_start_at_their_own_size() -> None:
    net = create("mobilenetv2")
    depthwise = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 100]
    spread = torch.cat([m.weight.flatten() for m in depthwise]).std().item()
    assert spread == pytest.approx((2 / 9) ** 0.5, rel=0.02)


def test_names_carry_numbers() -> None:
    assert parameters(create("resnet26")) > parameters(create("resnet20"))
    assert parameters(create("resnet20_a")) == parameters(create("resnet20", shortcut="A")) == 269722
    assert create("wrn_10_3").linear.in_features == 192
    mlp = create("mlp_32_16", in_features=64, num_classes=10)
    assert parameters(mlp) == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert create("resnet8", widths=(4, 4, 8, 16)).linear.in_features == 16
    assert create("wrn_16_1", dropout=0.3).layer1[0].dropout.p == 0.3


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet21", {}, "6n\\+2"),
        ("resnet50", {}, "ResNet50"),
        ("wrn_15_2", {}, "6n\\+4"),
        ("wrn_16_0", {}, "1 or more"),
        ("mobilnetv2", {}, "did you mean 'mobilenetv2'"),
        ("nonsense", {}, "the known ones: .*vgg8"),
        ("resnet20", {"shortcuts": "A"}, "did you mean 'shortcut'"),
        ("resnet20", {"shortcut": "C"}, "'A' or 'B'"),
        ("resnet20", {"widths": (16, 32)}, "4 numbers"),
        ("resnet20", {"num_classes": 0}, "num_classes: .*positive"),
        ("resnet20", {"in_channels": 1.5}, "in_channels: .*positive"),
        ("vgg8", {"depth": 11}, "vgg8.depth"),
        ("resnet20_a", {"shortcut": "B"}, "no such option"),
        ("vit_mini", {"patch_size": 5}, "divisor of 32"),
        ("vit_mini", {"image_size": 8, "patch_size": 16}, "divisor of 8"),
        ("mlp", {"hidden": (0,)}, "one unit"),
        ("mlp", {"hidden": 3}, "mlp"),
        ("mlp_0", {}, "one unit"),
        ("wrn_16_1", {"dropout": 2.0}, "dropout probability"),
    ],
)
def test_mistakes_are_told_in_one_message(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        create(name, **options)


def test_every_name_can_be_made_and_is_in_order() -> None:
    names = available()
    assert len(names) == len(set(names))
    assert names.index("resnet8") < names.index("resnet14") < names.index("resnet110")
