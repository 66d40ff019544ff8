"""The form in which recipes name a thing with options: ``name``, or ``{name: {option: value}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.core.errors import ConfigError


def read_named(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """A name and its options.

    Raises:
        ConfigError: It is neither form.

    >>> read_named({"top_k": {"k": 20}}, "codec"), read_named({"flip": None}, "augment")
    (('top_k', {'k': 20}), ('flip', {}))
    """
    name, options = value, None
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
    if not isinstance(name, str) or not (options is None or isinstance(options, Mapping)):
        raise ConfigError("cannot be read", where=where, found=repr(value), wanted="a name, or {name: {option: value}}")
    return name, dict(options or {})
