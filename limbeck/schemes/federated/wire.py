"""What crosses between owners and the server: named tensors as bytes, of names that a method has declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from limbeck.core.errors import TensorError

Tensors = dict[str, Tensor]


def pack(tensors: Mapping[str, Tensor], declared: Iterable[str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file; what is counted as sent is the length of these.

    Args:
        tensors: By name; a name is ``kind`` or ``kind/more``.
        declared: Kinds that may cross; ``None``: any, for what stays on one side.

    Raises:
        TensorError: A kind was not declared.

    >>> import torch
    >>> payload = pack({"weights/a": torch.ones(2)}, ["weights"]); unpack(payload, ["weights"])
    {'weights/a': tensor([1., 1.])}
    """
    _check(tensors, declared)
    return bytes(save({name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}))


def unpack(payload: bytes, declared: Iterable[str] | None = None) -> Tensors:
    """Put back what ``pack`` made; bytes that are no such thing, or of other kinds, are refused."""
    try:
        tensors = load(payload)
    except SafetensorError as error:
        raise TensorError(
            f"these bytes hold no tensors: {error}", where="wire", found=f"{len(payload)} bytes"
        ) from None
    _check(tensors, declared)
    return tensors


def under(kind: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors with a kind before their names.

    >>> list(under("weights", {"a": None}))
    ['weights/a']
    """
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def below(kind: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of one kind, without it before their names."""
    return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}


def _check(tensors: Iterable[str], declared: Iterable[str] | None) -> None:
    kinds = None if declared is None else tuple(declared)
    for name in tensors:
        if kinds is not None and name.partition("/")[0] not in kinds:
            raise TensorError(
                "this must not cross between clients and server",
                where=f"wire: {name}",
                wanted=f"only {', '.join(kinds) or 'nothing'}",
            )
