"""The self-describing cache of what a teacher says: build it once, learn from it as often as you like."""

from limbeck.cache.build import build, merge
from limbeck.cache.folder import Cache

__all__ = ["Cache", "build", "merge"]
