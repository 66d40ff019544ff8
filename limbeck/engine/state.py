"""What a run remembers beside its weights, as tensors and plain values: optimizers, schedulers, random states."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.core.errors import CheckpointError

Plain = dict[str, Any]


def pack_optimizer(optimizer: Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], Plain]:
    """An optimizer's state as tensors (``"exp_avg/layer.weight"``) and plain values.

    Args:
        optimizer: Whose.
        names: Each parameter's name, by ``id``.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Plain] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                values.setdefault(name, {})[key] = value
    groups = [
        {**{k: _plain(v) for k, v in g.items() if k != "params"}, "params": [names[id(p)] for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def unpack_optimizer(optimizer: Optimizer, names: dict[int, str], tensors: dict[str, Tensor], plain: Plain) -> None:
    """Put back what ``pack_optimizer`` took. Layouts are those of the parameters, which fused steps rely on.

    Raises:
        CheckpointError: It is the state of other parameters.
    """
    found = [g["params"] for g in plain["groups"]]
    wanted = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    if found != wanted:
        odd = sorted({n for g in found for n in g} ^ {n for g in wanted for n in g})
        raise CheckpointError(
            "the optimizer's state is of other parameters", where="optimizer", found=odd[:3] or "order"
        )
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        for key, value in saved.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    parameters = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}
    for name, state in plain["values"].items():
        optimizer.state[parameters[name]].update(state)
    for place, tensor in tensors.items():
        key, _, name = place.partition("/")
        parameter = parameters[name]
        if tensor.shape == parameter.shape and key != "step":
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        elif tensor.ndim:  # counters stay on the host, see below
            tensor = tensor.to(parameter.device)
        optimizer.state[parameter][key] = tensor
    if _fused(optimizer):  # a fused step wants its counter beside the parameter
        for parameter, state in optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


def _fused(optimizer: Optimizer) -> bool:
    return any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return list(value) if isinstance(value, tuple) else value


def pack_scheduler(scheduler: Any) -> Plain:
    """What moves in a scheduler: numbers, texts and lists of them; the rest comes from its configuration."""
    return {k: v for k, v in ((k, _plain(v)) for k, v in scheduler.state_dict().items()) if _is_plain(v)}


def unpack_scheduler(scheduler: Any, plain: Plain) -> None:
    """Put back what ``pack_scheduler`` took."""
    scheduler.load_state_dict({**scheduler.state_dict(), **plain})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def seed_everything(seed: int, stage: int, rank: int = 0) -> None:
    """Start the random states of torch, numpy and python from (seed, stage, rank)."""
    words = np.random.SeedSequence([seed, stage, rank]).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    random.seed(int(words[3]))


def pack_random(device: torch.device) -> dict[str, Tensor]:
    """The random states of torch (host and device), numpy and python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, spare = random.getstate()
    assert kind == "MT19937"
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_rest": torch.tensor([math.nan if spare is None else spare], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_random(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what ``pack_random`` took."""
    states = {k: v.cpu().clone() for k, v in states.items()}  # torch reads its state from the storage's beginning
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, *words = states["python"].tolist()
    spare = float(states["python_rest"])
    random.setstate((version, tuple(words), None if math.isnan(spare) else spare))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
