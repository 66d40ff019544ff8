"""Every method's pure function, ``<key>_loss``: tensors in, a tensor out, for anybody's own loop."""

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue

_functions = {m.function.__name__: m.function for m in catalogue.methods().values() if m.function is not None}
globals().update(_functions)
__all__ = sorted(_functions)


def __getattr__(name: str) -> object:
    raise AttributeError(f"limbeck has no function {name!r}; it has {', '.join(__all__)}")
