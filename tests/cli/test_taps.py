"""limbeck taps: places, roles, pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_places_and_roles_with_shapes(limbeck: Command) -> None:
    answer = limbeck("taps", "resnet8", "--input", "1x8x8")
    assert answer.code == 0
    assert "layer2.0" in answer.out
    assert "[B, 32, 4, 4]" in answer.out
    assert "linear@in" in answer.out
    assert "no attention maps" in answer.out


def test_pairs_with_a_teacher(limbeck: Command) -> None:
    facts = limbeck("taps", "resnet8", "--teacher", "wrn_16_2", "--json").json
    stages = facts["pairs"]["stages"]
    assert [pair[0] for pair in stages] == ["layer1", "layer2", "layer3"]
    assert all(
        own[2:] == other[2:] for _, own, _, other in [(a, b.split(","), c, d.split(",")) for a, b, c, d in stages]
    )
    assert "pairs proposed for stages" in limbeck("taps", "resnet8", "--teacher", "wrn_16_2").out


def test_a_tap_it_prints_is_a_tap(limbeck: Command) -> None:
    import torch

    from limbeck.core.taps import listen
    from limbeck.models import create

    facts = limbeck("taps", "vit_mini", "--json").json
    taps = [t for role in facts["roles"].values() for t in role.get("taps", ())]
    trace = listen(create("vit_mini"), torch.zeros(2, 3, 32, 32), [t["tap"] for t in taps])
    assert all(list(trace[t["tap"]].shape) == t["shape"] for t in taps)


def test_vectors_and_models_of_ones_own(limbeck: Command, tmp_path: Path) -> None:
    (tmp_path / "my_cli_net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))\n"
    )
    facts = limbeck("taps", "my_cli_net:net", "--input", "6", "--json").json
    assert [p["name"] for p in facts["places"]] == ["0", "1", "."]


def test_a_transformers_model_knows_what_it_takes(limbeck: Command, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    facts = limbeck("taps", tmp_path / "bert", "--input", "tokens:7", "--json").json
    assert len(facts["roles"]["blocks"]["taps"]) == 2
    assert limbeck("taps", tmp_path / "bert", "--json").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet9"], "no such depth"),
        (["resnett20"], "did you mean"),
        (["resnet8", "--input", "threebytwo"], "this is no size"),
        (["resnet8", "--input", "64"], "does not take these inputs"),
        (["resnet8", "--input", "0x8x8"], "this is no size"),
    ],
)
def test_mistakes(limbeck: Command, arguments: list[str], message: str) -> None:
    answer = limbeck("taps", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
