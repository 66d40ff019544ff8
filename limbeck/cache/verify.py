"""Ask the teacher again: does it still say what was stored?"""

from __future__ import annotations

from typing import Any

import torch

from limbeck.cache.folder import Cache, own_arrays
from limbeck.cache.prints import row_prints
from limbeck.core.errors import CacheError
from limbeck.core.teacher import Teacher, teacher_mask
from limbeck.data.loader import IndexedLoader

_MORE, _LEAST = 1.5, 1e-4  # times the error when it was stored, and what rounding may do where that was nothing


def ask_again(cache: Cache, teacher: Teacher, loader: IndexedLoader, samples: int = 64) -> dict[str, Any]:
    """Compare some rows of a cache with what the teacher says of them now.

    Args:
        cache: Whole.
        teacher: Who spoke.
        loader: Gives the views it spoke of.
        samples: How many rows, evenly spread over samples and views.

    Returns:
        ``asked``: how many rows; ``errors``: the largest by signal and measure.

    Raises:
        CacheError: The samples are others than the teacher saw, or it says something else.
    """
    header = cache.header
    rows = torch.linspace(0, header.rows - 1, min(samples, header.rows)).round().long()
    view, index = rows // header.samples, rows % header.samples
    pieces = [(index[view == v].to(loader.device), v) for v in view.unique().tolist()]
    (batch,) = loader.read([pieces])
    wrong = row_prints(batch).cpu() != cache.prints(index, view)
    if bool(wrong.any()):
        raise CacheError("the samples are not those that the teacher saw", where=str(cache.folder))
    teacher.to(loader.device)
    teacher.attach(header.taps, batch)
    trace = teacher(batch)
    found = cache.arrays(index, view)
    errors: dict[str, dict[str, float]] = {}
    for signal in header.signals:
        now = signal.flatten(signal.of(trace), teacher_mask(batch)).cpu()
        stored = signal.codec.decode(own_arrays(signal, found), signal.shape, signal.dtype)
        if signal.text and not torch.equal(now, stored):
            raise CacheError("the teacher says something else now", where=signal.name)
        for measure, values in signal.lost(now, stored).items():
            allowed = _MORE * cache.errors[signal.name][measure]["max"] + _LEAST
            most = float(values.max())
            errors.setdefault(signal.name, {})[measure] = most
            if not most <= allowed:
                raise CacheError(
                    "the teacher says something else now",
                    where=signal.name,
                    found=f"{measure} error {most:.3g}",
                    wanted=f"at most {allowed:.3g}",
                )
    for tap, constant in cache.constants.items():
        if not torch.equal(constant, trace[tap].detach().cpu()):
            raise CacheError("the teacher holds something else now", where=tap)
    return {"asked": len(rows), "errors": errors}
