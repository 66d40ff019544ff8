"""Keeps a data set's own random choices apart from the rest of the program, and repeatable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class OwnRandomness:
    """Random states of ``torch``, ``numpy`` and ``random`` that belong to one owner.

    Within :meth:`active` the global generators are the owner's; afterwards they are as they were, so that data never
    change what the training draws, and the training never changes what the data draw.
    """

    def __init__(self, seed: int) -> None:
        with self.kept():
            self.seed(seed)
            self._state = _states()

    @staticmethod
    def seed(seed: int) -> None:
        """Seed the three global generators; for use within :meth:`active` or :meth:`kept`."""
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)

    @contextmanager
    def active(self) -> Iterator[OwnRandomness]:
        """Let the owner's states be the global ones."""
        with self.kept():
            _restore(self._state)
            try:
                yield self
            finally:
                self._state = _states()

    @staticmethod
    @contextmanager
    def kept() -> Iterator[None]:
        """Leave the global generators as they are now, whatever is seeded and drawn meanwhile."""
        states = _states()
        try:
            yield
        finally:
            _restore(states)


def _states() -> tuple[torch.Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[torch.Tensor, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
