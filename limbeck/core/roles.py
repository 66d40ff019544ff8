"""From the name of a tap to places in a model: dotted names, and roles that work on any model.

======================  ==============================================================================
tap                     means
======================  ==============================================================================
``layer3.0.conv1``      the output of that module; ``.`` is the whole model
``head@in``             what enters it
``encoder.3[1]``        the second entry of a tuple it returns
``shared#1``            its second call, where a module runs several times in one forward
``logits``              the model's logits
``penultimate``         what enters the last linear layer that runs
``stages``              the last layer at each spatial resolution (all of them, or ``stages:1``, ``stages:-1``)
``preactivations``      the same layers before their ReLU (or other nonlinearity), where it is a module of its own
``blocks``              the repeated blocks, in order (``blocks:0``, ``blocks:-1``)
``attention``           attention maps by layer (``attention:0``)
``queries``             what makes the queries of each attention; so ``keys`` and ``values``. A fused layer stands for
                        all three: it gives them side by side, three times as wide
``embeddings``          where tokens are looked up: ``embeddings:0@weight`` is the (largest) table ``[V, D]``
``blocks:-1@in``        what enters the place a role means, or ``@module``, ``@weight``: as with names
``logits@weight``       the weight ``[C, D]`` of the linear layer that makes the logits (the last that runs);
                        ``logits@bias`` its bias ``[C]``, zeros where it has none; ``logits@in`` what enters it, refused
                        where the model changes what comes out of it (scales it, caps it) before that is its logits
``layer4@module``       the module itself, ``fc@weight`` a parameter of it
``head.ce``             a part of the head that was put on the model, wherever it stands (``limbeck.models.put_head``)
======================  ==============================================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from limbeck.core.errors import TapError, did_you_mean
from limbeck.core.survey import Place

_NAME = re.compile(
    r"^(?P<path>[^@#\[\]:]+)(\[(?P<element>\d+)\])?(@(?P<side>in|out|weight|bias|module))?(#(?P<call>\d+))?$"
)
_ROLE = re.compile(r"^(?P<role>[a-z]+)(:(?P<index>-?\d+))?$")
_SIDES = ("", "in", "out", "weight", "bias", "module")  # "": the side a role means


@dataclass(frozen=True)
class Spot:
    """One value to capture: which module, its input or output, which entry, at which call; or what it holds itself."""

    module: str
    side: Literal["in", "out", "weight", "bias", "module"] = "out"
    element: int | None = None
    call: int = 0

    @property
    def held(self) -> bool:
        """It is part of the model, and needs no forward."""
        return self.side in ("weight", "bias", "module")


def resolve(tap: str, places: dict[str, Place]) -> Spot | list[Spot]:
    """Where a tap listens; a list for a plural role.

    Raises:
        TapError: No such place or role; the message names near misses.
    """
    if tap.startswith("logits@") and "logits" not in places:
        last = places[_penultimate(places)[0].module]
        if tap == "logits@in" and not last.logits:
            raise TapError(
                "this model's logits are not what its last linear layer gives",
                where=tap,
                found=f"{last.name!r}, whose outputs are changed or chosen from (scaled, capped, pooled, adapted)",
                remedy="use an objective that takes the logits themselves",
            )
        tap = f"{last.name}@{tap.partition('@')[2]}" + (f"#{last.calls - 1}" if last.calls > 1 else "")
    if tap.startswith("head."):
        tap = _of_head(tap, places)
    place, _, side = tap.partition("@")
    role = _ROLE.match(place)
    if role and role["role"] in ROLES and place not in places and side in _SIDES:
        spots = [_at(spot, side) for spot in ROLES[role["role"]](places)]
        if role["role"] == "penultimate" and role["index"] is None:
            return spots[0]
        if role["index"] is None:
            return spots
        index = int(role["index"])
        if not -len(spots) <= index < len(spots):
            raise TapError(
                f"this model has {len(spots)} {role['role']}",
                where=tap,
                wanted=f"an index from {-len(spots)} to {len(spots) - 1}",
                found=", ".join(s.module for s in spots),
            )
        return spots[index]
    return _named(tap, places)


def _at(spot: Spot, side: Any) -> Spot:
    return replace(spot, side=side, element=None) if side else spot


def _named(tap: str, places: dict[str, Place]) -> Spot:
    match = _NAME.match(tap)
    path = match["path"] if match else tap
    if not match or path not in places:
        raise TapError(
            "no such place ran in this model",
            where=tap,
            remedy=did_you_mean(path, [*places, *ROLES, "logits"]) or "list its places with: limbeck taps MODEL",
        )
    if match["side"] in ("weight", "bias", "module"):
        return Spot(path, match["side"])  # type: ignore[arg-type]
    place, call = places[path], match["call"]
    if call is None and place.calls > 1:
        raise TapError(
            f"this module runs {place.calls} times in one forward", where=tap, remedy=f"say which: {tap}#0 is the first"
        )
    if call is not None and int(call) >= place.calls:
        raise TapError("it does not run that often", where=tap, found=f"{place.calls} calls in one forward")
    element = int(match["element"]) if match["element"] else None
    if element is not None and element >= len(place.outputs):
        raise TapError("it does not return that many values", where=tap, found=f"{len(place.outputs)} values")
    return Spot(path, "in" if match["side"] == "in" else "out", element, int(call or 0))


def _of_head(tap: str, places: dict[str, Place]) -> str:
    """The whole name of a head's part; a module of the model's own that is called so comes first."""
    match = _NAME.match(tap)
    path = match["path"] if match else tap
    if path in places:
        return tap
    part = path.partition(".")[2]
    found = [p.name for p in places.values() if p.head and f"{p.name}.{part}" in places]
    if not found:
        parts = [
            f"head.{n[len(p.name) + 1 :]}" for p in places.values() if p.head for n in places if _inside(n, p.name)
        ]
        parts = [part for part in parts if part.count(".") == 1]
        raise TapError(
            "this model has no head with such a part",
            where=tap,
            found=", ".join(parts) if parts else "the model's own last layer",
            remedy=did_you_mean(path, [name for name in places if name != "."])
            or "give it one: head: NAME in a recipe's student, or limbeck.models.put_head",
        )
    return found[-1] + tap.removeprefix("head")


def _penultimate(places: dict[str, Place]) -> list[Spot]:
    linear = [p for p in places.values() if p.linear]
    if not linear:
        raise TapError(
            "this model has no linear layer",
            where="penultimate",
            remedy="name the place itself; limbeck taps lists them",
        )
    last = max(linear, key=lambda p: p.order)
    return [Spot(last.name, "in", call=last.calls - 1)]


def _stages(places: dict[str, Place]) -> list[Spot]:
    """The last module to finish at each resolution of maps ``[B, C, H, W]``; the last block at each length of rows.

    What runs inside a repeated block at another resolution than the block's output does not count: the expansion of an
    inverted bottleneck, the tensors of a channels-last interior, a bias map.
    """
    repeated = _repeated(places)
    last: dict[tuple[int, ...], Place] = {}
    if repeated and all(len(p.shape or ()) == 3 for p in repeated):
        for spot in _blocks(places):
            last[places[spot.module].shape[1:2]] = places[spot.module]  # type: ignore[index]
    for place in places.values() if not last else ():
        resolution = _resolution(place)
        inner = any(_inside(place.name, b.name) and _resolution(b) != resolution for b in repeated)
        if resolution and not inner and place.name != ".":
            last[resolution] = place
    if not last:
        raise TapError(
            "this model has no spatial maps or token rows", where="stages", remedy="use blocks, or name the places"
        )
    return [_spot(p) for p in sorted(last.values(), key=lambda p: p.order)]


def _preactivations(places: dict[str, Place]) -> list[Spot]:
    """What enters the last nonlinearity of each stage's own shape; the stage itself where there is none.

    In residual networks that is the sum at a stage's end, in those with the nonlinearity first what the next stage's
    first normalisation gives.
    """
    found = []
    for spot in _stages(places):
        shape = places[spot.module].shape
        bends = [p for p in places.values() if p.leaf and p.module in NONLINEARITIES and p.inputs == shape]
        last = max(bends, key=lambda p: p.order, default=None)
        found.append(spot if last is None else Spot(last.name, "in", call=last.calls - 1))
    return found


def _resolution(place: Place) -> tuple[int, ...] | None:
    shape = place.shape
    if shape is None or place.probabilities or len(shape) != 4 or prod(shape[2:]) == 1:
        return None
    return shape[2:]


def _repeated(places: dict[str, Place]) -> list[Place]:
    """Modules with children that stand in lists (``layer1.0``) and have a sibling of their own class."""
    listed = [p for p in places.values() if not p.leaf and p.name.rpartition(".")[2].isdigit()]
    count = Counter(p.module for p in listed)
    return [p for p in listed if count[p.module] > 1]


def _blocks(places: dict[str, Place]) -> list[Spot]:
    """The outermost repeated modules; of several classes the one with most parameters.

    Where no two of them map the same shape to the same shape and each holds repeated modules in turn, they are stages,
    and the blocks are one level down.
    """
    candidates, descended = _repeated(places), False
    while candidates:
        outer = [p for p in candidates if not any(_inside(p.name, q.name) for q in candidates)]
        weight: Counter[str] = Counter()
        for place in outer:
            weight[place.module] += place.parameters
        chosen = [p for p in outer if p.module == max(weight, key=lambda m: weight[m])]
        inner = [p for p in candidates if any(_inside(p.name, q.name) for q in chosen)]
        distinct = len({(p.inputs, p.shape) for p in chosen}) == len(chosen)
        stages = distinct and not descended and all(any(_inside(p.name, q.name) for p in inner) for q in chosen)
        if not stages:
            return [_spot(p) for p in sorted(chosen, key=lambda p: p.order)]
        candidates, descended = inner, True
    raise TapError(
        "this model has no repeated blocks", where="blocks", remedy="name the places; limbeck taps lists them"
    )


def _inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _embeddings(places: dict[str, Place]) -> list[Spot]:
    """The table of tokens: of positions and kinds of tokens there are fewer."""
    tables = [p for p in places.values() if p.leaf and p.module.endswith("Embedding") and p.parameters]
    if not tables:
        raise TapError(
            "this model looks no tokens up", where="embeddings", remedy="name the layer; limbeck taps lists them"
        )
    return [_spot(max(tables, key=lambda p: (p.parameters, -p.order)))]


def _attention(places: dict[str, Place]) -> list[Spot]:
    found = [p for p in places.values() if p.probabilities]
    innermost = [p for p in found if not any(_inside(q.name, p.name) for q in found if p.name != ".") and p.name != "."]
    if not innermost:
        raise TapError(
            "no attention maps came out of any module",
            where="attention",
            remedy="transformers models hand them out with attn_implementation='eager'",
        )
    ordered = sorted(innermost, key=lambda p: p.order)
    return [Spot(p.name, "out", p.probabilities[0], p.calls - 1) for p in ordered]


def _makers(what: str, names: frozenset[str]) -> Callable[[dict[str, Place]], list[Spot]]:
    """The role of the layers of these names: what has no name of its own in a model goes by what it is called."""

    def find(places: dict[str, Place]) -> list[Spot]:
        found = [p for p in places.values() if p.leaf and p.name.rpartition(".")[2] in names | _FUSED]
        if not found:
            raise TapError(
                f"no layer of this model is known to make {what}",
                where=what,
                wanted=f"a layer called {', '.join(sorted(names | _FUSED))}",
                remedy="name the layer itself; limbeck taps lists them",
            )
        return [_spot(p) for p in sorted(found, key=lambda p: p.order)]

    return find


def _spot(place: Place) -> Spot:
    return Spot(place.name, "out", call=place.calls - 1)


NONLINEARITIES = frozenset(
    {"ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish"}
)
_FUSED = frozenset({"qkv", "to_qkv", "qkv_proj", "Wqkv", "c_attn"})
ROLES: dict[str, Callable[[dict[str, Place]], list[Spot]]] = {
    "penultimate": _penultimate,
    "stages": _stages,
    "preactivations": _preactivations,
    "blocks": _blocks,
    "embeddings": _embeddings,
    "attention": _attention,
    "queries": _makers("queries", frozenset({"q", "query", "q_proj", "to_q", "q_lin", "query_proj", "wq"})),
    "keys": _makers("keys", frozenset({"k", "key", "k_proj", "to_k", "k_lin", "key_proj", "wk"})),
    "values": _makers("values", frozenset({"v", "value", "v_proj", "to_v", "v_lin", "value_proj", "wv"})),
}
