"""Calibration: a few batches through the teacher, and what is listened to on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import DataError, ModelError
from limbeck.core.survey import call_model, dry
from limbeck.data.collate import to_batch

Inputs = dict[str, Any]
Hook = Callable[[nn.Module, Any, Any], Any]
Listener = Callable[[Tensor, Tensor, Tensor], None]


def inputs_of(model: Any, batches: Iterable[Any]) -> list[Inputs]:
    """Batches as keywords for a transformers model, on its device.

    Args:
        model: Which takes them.
        batches: Tensors, dicts as a collator gives them, ``Batch``es. Labels are left out, unless an encoder-decoder
            needs them to know what its decoder sees.

    Raises:
        DataError: There is none, or one is no mapping and no tensor.
    """
    found = []
    for item in batches:
        batch = to_batch(item)
        given = batch.inputs
        if isinstance(given, Tensor):
            given = {model.main_input_name: given}
        if not isinstance(given, Mapping):
            raise DataError(
                "a calibration batch holds no keywords for the model",
                where="importance",
                found=type(given).__name__,
                wanted="a dict such as {'input_ids': ..., 'attention_mask': ...}, or a tensor",
            )
        found.append(_on_device(model, _complete(model, dict(given), batch)))
    if not found:
        raise DataError(
            "there is no calibration batch", where="importance", remedy="give batches, or a list instead of a generator"
        )
    return found


def _complete(model: Any, given: Inputs, batch: Batch) -> Inputs:
    if "decoder_input_ids" not in given and getattr(model.config, "is_encoder_decoder", False):
        if batch.labels is None:
            raise DataError(
                "an encoder-decoder needs to know what its decoder sees",
                where="importance",
                wanted="labels or decoder_input_ids in every batch",
            )
        given["labels"] = batch.labels
    return given


def _on_device(model: Any, given: Inputs) -> Inputs:
    given = map_tensors(given, lambda tensor: tensor.to(model.device))
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    return given


def made_up_inputs(model: Any, ids: Tensor, length: int = 16) -> Inputs | None:
    """Inputs of two samples for a model of which nothing else is known; ``None`` where it takes neither ids nor images.

    Args:
        model: Which takes them.
        ids: ``[V]`` token ids to draw from.
        length: Number of tokens at most.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        length = min(length, getattr(config, "max_position_embeddings", length) - 2)
        drawn = ids.cpu()[torch.randint(len(ids), (2, max(length, 1)), generator=generator)]
        given: Inputs = {"input_ids": drawn}
        if getattr(config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = drawn.flip(0)
    elif model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (2, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        given = {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    else:
        return None
    return _on_device(model, given)


def example_inputs(model: Any, example: Any, batches: list[Inputs] | None, ids: Tensor, where: str) -> Inputs:
    """The example given, else the first calibration batch, else inputs made up.

    Raises:
        ModelError: Nothing can be made up for this model.
    """
    if example is not None:
        return inputs_of(model, [example])[0]
    found = batches[0] if batches else made_up_inputs(model, ids, length=128)
    if found is None:
        raise ModelError("what this model takes cannot be made up", where=where, remedy="give example=inputs")
    return found


@contextmanager
def hooked(hooks: Mapping[nn.Module, Hook], *, before: bool = False) -> Iterator[None]:
    """Call functions ``(module, given, output)`` after modules (``before``: with what they are given alone).

    What a function returns, if anything, takes the place of the output, or of the first argument.
    """

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = hooks[module](module, first(args, kwargs), None)
        return None if changed is None else ((changed, *args[1:]), kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return hooks[module](module, first(args, kwargs), output)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True)
        if before
        else module.register_forward_hook(leave, with_kwargs=True)
        for module in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: Any, inputs: Inputs) -> Any:
    """One forward in evaluation mode without gradients; modes and random state are as before afterwards."""
    with dry(model):
        return call_model(model, inputs)


def pass_through(model: Any, batches: list[Inputs], listeners: Mapping[str, Listener]) -> None:
    """Run every batch; after each named module call its listener with three tensors.

    They are weights ``[B, T]`` (1 where a token counts, 0 where it is padding), what the module was given and what it
    made of it, ``[B, T, *]`` each.
    """
    modules = dict(model.named_modules())
    here: Inputs = {}

    def hook(name: str) -> Hook:
        def call(_: nn.Module, given: Tensor, output: Any) -> None:
            samples = len(next(value for value in here.values() if isinstance(value, Tensor)))
            made = state_of(output)
            # Some families lay all tokens in one row (OPT).
            given, made = (v.reshape(samples, -1, v.shape[-1]) for v in (given, made))
            listeners[name](counts_of(model, here, given, name), given, made)

        return call

    with hooked({modules[name]: hook(name) for name in listeners}):
        for inputs in batches:
            here.clear()
            here.update(inputs)
            run(model, inputs)


def state_of(output: Any) -> Tensor:
    """The hidden state in what a module returns: itself, or the first of several."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def counts_of(model: Any, inputs: Inputs, tensor: Tensor, name: str = "decoder") -> Tensor:
    """Weights ``[B, T]`` of places in a tensor ``[B, T, *]`` that a module gave, 1 where a token counts; of rows
    ``[B, C]`` they are ``[B]``.

    Args:
        model: Whose module.
        inputs: What the model was given.
        tensor: What the module gave.
        name: Which module; of an encoder-decoder it tells on which side it stands.
    """
    mask = inputs.get("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False) and "decoder" in name.split("."):
        mask = inputs.get("decoder_attention_mask")
        if mask is None and "labels" in inputs:
            mask = inputs["labels"] >= 0
    places = tensor.shape[:-1][:2]
    if isinstance(mask, Tensor) and mask.shape == places:
        return mask.to(tensor.device).float()
    return torch.ones(places, device=tensor.device)
