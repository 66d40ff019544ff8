"""Checks for anybody's objectives: ``check_objective(MyObjective())`` runs the conformance suite over it.

>>> from limbeck.testing import checks
>>> next(c.promise for c in checks() if c.name == "decomposes")
'Micro-batches and ranks, evenly cut or not, add up to the gradient of the whole batch.'
"""

from limbeck.conformance.check import Check
from limbeck.conformance.suite import Nonconforming, Report, Result, check_objective, checks

__all__ = ["Check", "Nonconforming", "Report", "Result", "check_objective", "checks"]
