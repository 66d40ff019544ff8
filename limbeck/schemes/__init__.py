"""Who teaches whom, and when: schemes by name, one a file. A scheme turns models and losses into stages.

This face imports every file of the room, so a new scheme needs no entry.
"""

import sys

from limbeck.core import catalogue
from limbeck.schemes.perform import perform
from limbeck.schemes.scheme import Cast, Scheme, StagedScheme, Training, build, carded, options, register, schemes

catalogue.discover(sys.modules[__name__])
globals().update({cls.__name__: cls for cls in schemes().values()})
__all__ = [
    "Cast",
    "Scheme",
    "StagedScheme",
    "Training",
    "build",
    "carded",
    "options",
    "perform",
    "register",
    "schemes",
    *sorted(c.__name__ for c in schemes().values()),
]


def __getattr__(name: str) -> type:
    raise AttributeError(f"limbeck has no scheme {name!r}; it has {', '.join(schemes())}")
