"""Every objective, one file each. This face imports them all and hands their names on; a new file needs no entry."""

import sys

from limbeck.core import catalogue

catalogue.discover(sys.modules[__name__])
catalogue.load_entry_points()
globals().update({m.cls.__name__: m.cls for m in catalogue.methods().values()})
__all__ = sorted({m.cls.__name__ for m in catalogue.methods().values()})


def __getattr__(name: str) -> type:
    raise AttributeError(f"limbeck has no objective {name!r}; it has {', '.join(__all__)}")
