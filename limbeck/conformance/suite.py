"""The suite: every check over one objective, in every setting it works in."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from torch import nn

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.conformance import (
    cards,
    compiling,
    gradients,
    masks,
    neutrality,
    precision,
    refusals,
    sizes,
    splits,
    state,
    values,
)
from limbeck.conformance.case import Case
from limbeck.conformance.check import Check, Failure
from limbeck.conformance.scene import drawing
from limbeck.conformance.settings import Maker, Setting, all_settings, given, special_settings
from limbeck.conformance.subject import Subject
from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, LimbeckError, did_you_mean
from limbeck.core.objective import DataInfo, Objective

# In this order: a check that others stand on comes before them.
GROUPS = (values, gradients, masks, splits, sizes, precision, refusals, neutrality, state, compiling, cards)


def checks() -> tuple[Check, ...]:
    """Every check, in the order in which they run.

    >>> [c.name for c in checks()][:2]
    ['value', 'at_equal']
    """
    return tuple(
        c for group in GROUPS for c in vars(group).values() if isinstance(c, Check) and c.group == group.__name__
    )


@dataclass(frozen=True)
class Result:
    """What one check came to in one setting; ``detail`` says what was found, or why it was not run."""

    check: str
    setting: str
    status: Literal["passed", "failed", "skipped"]
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.status:8}{self.check} ({self.setting})" + (f": {self.detail}" if self.detail else "")


@dataclass
class Report:
    """What the suite found. Prints as a list with what failed first."""

    subject: str
    results: list[Result] = field(default_factory=list)

    def names(self, status: str) -> list[str]:
        """The checks that came to this in some setting."""
        return list(dict.fromkeys(r.check for r in self.results if r.status == status))

    @property
    def failed(self) -> list[str]:
        """The checks that failed."""
        return self.names("failed")

    @property
    def passed(self) -> list[str]:
        """The checks that failed nowhere and passed somewhere."""
        return [name for name in self.names("passed") if name not in self.failed]

    def __str__(self) -> str:
        order = {"failed": 0, "passed": 1, "skipped": 2}
        lines = [f"{self.subject}: {len(self.passed)} checks passed, {len(self.failed)} failed"]
        return "\n".join(lines + [f"  {r}" for r in sorted(self.results, key=lambda r: order[r.status])])


class Nonconforming(LimbeckError):
    """An objective does not keep what it promises.

    Args:
        report: What the suite found.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"\n  {r.check} ({r.setting}): {r.detail}" for r in report.results if r.status == "failed"]
        super().__init__("does not keep its promises" + "".join(lines), where=report.subject)


class Suite:
    """One objective with everything to check it by, made once for any number of checks.

    Args: as ``check_objective``.
    """

    def __init__(
        self,
        target: str | Objective | type[Objective],
        *,
        options: dict[str, Any] | None = None,
        student: nn.Module | Maker | None = None,
        teacher: nn.Module | Maker | None = None,
        batch: Batch | None = None,
        data: DataInfo | None = None,
    ) -> None:
        if student is None and (teacher is not None or batch is not None):
            raise ConfigError("a pair of your own needs a student and a batch", where="student", found="none")
        if student is not None and batch is None:
            raise ConfigError(
                "a pair of your own needs an example of what it is called with", where="batch", found="none"
            )
        self.subject = Subject.of(target, options)
        self.report = Report(self.subject.name)
        if student is not None and batch is not None:
            self.cases = _working(self.subject, [given(student, teacher, batch, data)], self.report)
            return
        special, tasks = special_settings(), self.subject.card.tasks if self.subject.card is not None else ()
        chosen = [setting for task, setting in special.items() if task in tasks]
        if not tasks or set(tasks) - special.keys():
            chosen = all_settings() + chosen
        self.cases = _working(self.subject, chosen, self.report)

    def run(self, check: Check) -> list[Result]:
        """One check in every setting; not where one that it stands on has failed before."""
        broken = set(self.report.failed)
        results = [_run(check, case, broken) for case in (self.cases[:1] if check.once else self.cases)]
        self.report.results += results
        return results


def check_objective(
    target: str | Objective | type[Objective],
    *,
    only: str | Iterable[str] | None = None,
    options: dict[str, Any] | None = None,
    student: nn.Module | Maker | None = None,
    teacher: nn.Module | Maker | None = None,
    batch: Batch | None = None,
    data: DataInfo | None = None,
    fail: bool = True,
) -> Report:
    """Check every promise an objective makes: its contract, its card, and what every objective owes.

    The suite brings its own small students and teachers (images, tokens, token sequences) and runs each check wherever
    the objective works. Give ``student``, ``teacher`` and ``batch`` for an objective whose taps only your models have.

    Args:
        target: A method's key, an objective, or its class (made without arguments).
        only: The checks to run, by name; ``*`` stands for anything.
        options: Options to make it with.
        student, teacher: Your own models, or functions that make them; they are copied and left alone.
        batch: An example batch of theirs, of four samples or more.
        data: What is known of the data set, where the objective needs it.
        fail: Raise where a check failed; else the report tells.

    Raises:
        Nonconforming: One error that lists the checks that failed, with what was found.
        ConfigError: No such check or method, or a pair given in part.

    >>> from limbeck.objectives import KD
    >>> check_objective(KD(temperature=2.0), only=["at_equal", "temp*"]).failed
    []
    """
    wanted = _wanted(only)
    suite = Suite(target, options=options, student=student, teacher=teacher, batch=batch, data=data)
    for check in wanted:
        suite.run(check)
    if fail and suite.report.failed:
        raise Nonconforming(suite.report)
    return suite.report


def _wanted(only: str | Iterable[str] | None) -> list[Check]:
    if only is None:
        return list(checks())
    patterns = [only] if isinstance(only, str) else list(only)
    names = [c.name for c in checks()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                "no such check",
                where="only",
                found=repr(pattern),
                wanted=f"one of {', '.join(names)}",
                remedy=did_you_mean(pattern, names),
            )
    return [c for c in checks() if any(fnmatchcase(c.name, p) for p in patterns)]


def _working(subject: Subject, settings: list[Setting], report: Report) -> list[Case]:
    """The settings it works in, the plainest of each kind. A setting it refuses clearly is none of its own."""
    cases: list[Case] = []
    refusals_: list[str] = []
    for setting in settings:
        case = Case(subject, setting)
        with _quiet():
            try:
                scene = case.scene()
                case.objective(scene)(scene.student, scene.teacher, scene.batch)
            except LimbeckError as error:
                refusals_.append(f"{setting.name}: {error}")
                continue
            except Exception as error:
                report.results.append(Result("runs", setting.name, "failed", _told(error)))
                continue
            # Sequences differ from images in what they have by position; an objective that sees none of it is done.
            if setting.name == "sequences" and cases and not case.places:
                continue
        cases.append(case)
    if cases:
        report.results.append(Result("runs", ", ".join(c.setting.name for c in cases), "passed"))
    elif not report.failed:
        report.results.append(Result("runs", "any", "failed", "it refuses every setting: " + "; ".join(refusals_)))
    return cases


def _run(check: Check, case: Case, broken: set[str]) -> Result:
    where = case.setting.name
    reason = check.unless(case)
    cause = next((name for name in check.after if name in broken), None)
    if reason is None and cause is not None:
        reason = f"not judged, since {cause} failed"
    if reason is not None:
        return Result(check.name, where, "skipped", reason)
    start = time.perf_counter()
    with _quiet():
        try:
            check.run(case)
        except Failure as failure:
            return Result(check.name, where, "failed", str(failure), time.perf_counter() - start)
        except Exception as error:  # whatever a stranger's objective raises is a finding, not a crash of the suite
            return Result(check.name, where, "failed", _told(error), time.perf_counter() - start)
    return Result(check.name, where, "passed", "", time.perf_counter() - start)


def _told(error: Exception) -> str:
    """What was raised and where in the objective's own code."""
    first = (str(error).strip().splitlines() or [""])[0][:240]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    return f"{type(error).__name__}: {first} ({frames[-1].filename}:{frames[-1].lineno})" if frames else first


@contextmanager
def _quiet() -> Iterator[None]:
    """All random states are as before afterwards."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        with drawing():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
