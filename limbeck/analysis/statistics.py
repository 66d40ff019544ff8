"""Means over seeds with the intervals that say how far to trust them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

from limbeck.core.errors import DataError

CONFIDENCE = 0.95


def summarise(values: Sequence[float]) -> dict[str, Any]:
    r"""Mean of some seeds' figures, with Student's t interval.

    .. math:: \bar x \pm t_{n-1,\,0.975} \frac{s}{\sqrt n}

    It takes the seeds' figures as independent and normal: the usual assumption, with few seeds not one that can be
    checked. It speaks of other seeds of this training on this data, not of other data.

    Args:
        values: One for each seed.

    Returns:
        ``mean``, ``sd`` and ``interval`` (both ``None`` for one seed), ``n``.

    Raises:
        DataError: No value.

    Source: Student, The probable error of a mean, 1908.

    >>> facts = summarise([0.90, 0.91, 0.92])
    >>> round(facts["mean"], 4), [round(x, 4) for x in facts["interval"]]
    (0.91, [0.8852, 0.9348])
    """
    if not values:
        raise DataError("no values to summarise", where="values")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"mean": mean, "sd": None, "interval": None, "n": 1}
    sd = statistics.stdev(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half], "n": n}


def compare_paired(values: Sequence[float], control: Sequence[float], lower: bool = False) -> dict[str, Any]:
    r"""How far a method is from its control, seed by seed.

    Runs of one seed share their start and their data's order, so what they share cancels out in the differences
    :math:`d_i = x_i - y_i`; the interval is that of their mean.

    Args:
        values: The method's figures by seed.
        control: The control's, of the same seeds in the same order.
        lower: Less of the figure is better, so that a gain is below 0.

    Returns:
        What ``summarise`` says of the differences, and ``verdict``: ``"gain"`` or ``"loss"`` where the interval
        excludes 0, else ``"unclear"``: also for a single seed, and where all differences are equal, since then nothing
        is known of how they vary.

    Raises:
        DataError: Different numbers of seeds, or none.

    >>> compare_paired([0.93, 0.94, 0.95], [0.90, 0.92, 0.91])["verdict"]
    'gain'
    >>> compare_paired([10.1, 9.9, 10.2], [11.0, 11.1, 10.9], lower=True)["verdict"]
    'gain'
    >>> compare_paired([0.93], [0.90])["verdict"]
    'unclear'
    """
    if len(values) != len(control):
        raise DataError(
            "a method and its control are compared seed by seed",
            where="values",
            found=f"{len(values)} and {len(control)}",
        )
    facts = summarise([x - y for x, y in zip(values, control, strict=True)])
    low, high = facts["interval"] or (-math.inf, math.inf)
    varied = facts["sd"] is not None and facts["sd"] > 1e-12
    above, below = ("loss", "gain") if lower else ("gain", "loss")
    facts["verdict"] = above if varied and low > 0 else below if varied and high < 0 else "unclear"
    return facts
