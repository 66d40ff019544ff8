"""FT's paraphraser and translator against the authors' modules, with their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from limbeck.objectives.parts.paraphraser import Paraphraser, three_layers


def test_paraphraser_and_translator() -> None:
    with np.load(Path(__file__).parent / "ft_authors.npz", allow_pickle=False) as file:
        numbers = {k.removeprefix("modules/"): torch.from_numpy(v) for k, v in file.items() if k.startswith("modules/")}
    paraphraser = Paraphraser(0.5).double()
    assert paraphraser.size(numbers["feature"]) == 3
    translator = three_layers(nn.Conv2d, 4, 4, 3, 3)
    for module, names in (
        (paraphraser.encoder, ("conv0", "conv1", "conv2")),
        (paraphraser.decoder, ("deconv0", "deconv1", "deconv2")),
        (translator, ("translator.conv0", "translator.conv1", "translator.conv2")),
    ):
        for layer, name in zip([m for m in module if hasattr(m, "weight")], names, strict=True):
            layer.load_state_dict({"weight": numbers[f"{name}.weight"], "bias": numbers[f"{name}.bias"]})
        module.double()
    factor, error = paraphraser(numbers["feature"])
    torch.testing.assert_close(factor, numbers["factor"])
    wanted = (numbers["told"] - numbers["feature"]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(error, wanted)
    torch.testing.assert_close(translator(numbers["student_feature"]), numbers["translated"])
