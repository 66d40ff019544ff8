"""What can end a call to a teacher that answers with text."""

from __future__ import annotations

from limbeck.core.errors import LimbeckError


class EndpointError(LimbeckError):
    """An endpoint refuses a prompt, or stays silent for longer than patience allows."""


class CapReached(LimbeckError):
    """The next prompt could cost more than is left of the spending cap."""


class Stopped(LimbeckError):
    """``stop()`` was called from another thread."""
