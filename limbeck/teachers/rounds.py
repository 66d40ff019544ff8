"""One call to a served teacher: which question goes when, and what becomes of it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from limbeck.core.errors import LimbeckError
from limbeck.teachers.answers import Answer
from limbeck.teachers.desk import Desk, Progress, terminable
from limbeck.teachers.endpoint import Failure
from limbeck.teachers.errors import CapReached, EndpointError, Stopped
from limbeck.teachers.questions import Question
from limbeck.teachers.record import Claim

_LOOK = 0.05  # seconds until a question that is asked elsewhere is looked at again
_BEAT = 0.25  # seconds after which a waiting call looks whether it was stopped


@dataclass(eq=False)
class _Job:
    question: Question
    key: str
    attempts: int = 0
    began: float = 0.0


class Round:
    """Asks questions, ``concurrency`` at a time, and yields the answers of each prompt when they are all there.

    The thread that asks for answers also plans: it claims questions, keeps to the limits and waits for what has to be
    asked again. Other threads only make attempts and write what comes of them to the record, so whatever ends the call,
    attempts that are under way are awaited and their answers kept.

    Args:
        desk: What the teacher's calls share.
        prompts: The questions of each prompt, one for each sample; taken as they are needed.
        total: How many prompts there are, where that is known.
    """

    def __init__(self, desk: Desk, prompts: Iterator[list[Question]], total: int | None) -> None:
        self.desk, self.total, self.done = desk, total, 0
        self.stop = threading.Event()
        self._prompts = enumerate(prompts)
        self._exhausted = False
        self._open: dict[int, list[Answer | None]] = {}
        self._wanted: dict[str, list[tuple[int, int]]] = {}
        self._ready: deque[_Job] = deque()
        self._later: list[tuple[float, int, _Job]] = []
        self._flight: dict[Future[Answer], _Job] = {}
        self._claimed: _Job | None = None
        self._finished: deque[tuple[int, list[Answer]]] = deque()
        self._order = itertools.count()

    def run(self) -> Generator[tuple[int, list[Answer]], None, None]:
        """Yield (place, answers) of each prompt as they come.

        Raises:
            EndpointError: The server refuses a prompt, or stays silent for too long.
            CapReached: The next question could cost more than the cap allows.
            Stopped: The call was stopped.
            DataError: The record is damaged or cannot be written.
        """
        pool = ThreadPoolExecutor(self.desk.concurrency, "limbeck-teacher")
        problem: LimbeckError | None = None
        with terminable():
            try:
                while True:
                    self._collect()
                    seconds = self._start(pool)
                    while self._finished:
                        yield self._finished.popleft()
                    if self._over():
                        return
                    self._wait(seconds)
            except (CapReached, EndpointError, Stopped) as error:
                problem = error
            finally:
                self._drain(pool)
        if problem is not None:
            raise self._told(problem) from problem.__cause__

    def _over(self) -> bool:
        return self._exhausted and not (self._flight or self._ready or self._later or self._finished)

    def _start(self, pool: ThreadPoolExecutor) -> float:
        """Let go what may go; return the seconds until more may."""
        desk = self.desk
        while len(self._flight) < desk.concurrency and not self._finished:
            if self.stop.is_set():
                raise Stopped("stopped")
            job = self._next()
            if job is None:
                break
            if job.key in desk.record:
                self._settle(job, self._reuse(job))
                continue
            desk.endpoint.connect()
            tokens = job.question.prompt_tokens + job.question.max_tokens
            seconds = desk.limits.take(tokens)
            if seconds > 0:
                self._ready.appendleft(job)
                return seconds
            self._claimed = job
            claim = desk.record.claim(job.key, desk.money.most(job.question), desk.money.cap)
            if claim is Claim.MINE:
                job.began = job.began or time.monotonic()
                self._flight[pool.submit(self._attempt, job)] = job
                self._claimed = None
                continue
            self._claimed = None
            desk.limits.give(tokens, requests=1)
            if claim is Claim.OVER:
                raise self._dear(job)
            self._put_off(job, 0.0 if claim is Claim.KNOWN else _LOOK)
        if self._finished:
            return 0.0
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else _BEAT

    def _next(self) -> _Job | None:
        """The next question: one that was put off and is due, one at hand, or one of the next prompt."""
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        while not self._ready and not self._exhausted and self._room():
            try:
                place, questions = next(self._prompts)
            except StopIteration:
                self._exhausted = True
                break
            self._open[place] = [None] * len(questions)
            for sample, question in enumerate(questions):
                key = question.key
                if key in self._wanted:
                    self._wanted[key].append((place, sample))
                else:
                    self._wanted[key] = [(place, sample)]
                    self._ready.append(_Job(question, key))
        return self._ready.popleft() if self._ready else None

    def _room(self) -> bool:
        """New prompts may begin: not too many are put off, and not so many fail that the server must be down."""
        failing = sum(job.attempts > 0 for _, _, job in self._later)
        return failing < self.desk.concurrency and len(self._later) < 16 * self.desk.concurrency

    def _attempt(self, job: _Job) -> Answer:
        """Ask once, and keep the answer. Runs in a thread of the pool."""
        desk, question = self.desk, job.question
        most = desk.money.most(question)
        try:
            answer = desk.endpoint.ask(question)
            desk.record.write(job.key, question.request, answer, desk.money.cost(question, answer.usage))
        except Failure as failure:
            desk.record.lose(job.key, most if failure.charged else 0.0)
            raise
        except BaseException:
            desk.record.free(job.key)
            raise
        if answer.usage is not None:
            desk.limits.give(question.prompt_tokens + question.max_tokens - sum(answer.usage))
        with desk.counts.lock:
            desk.counts.asked += 1
        return answer

    def _collect(self) -> None:
        """Take up what came of the attempts that have ended."""
        for future in [f for f in self._flight if f.done()]:
            job = self._flight.pop(future)
            try:
                self._settle(job, future.result())
            except Failure as failure:
                self._again(job, failure)
            except CancelledError:
                self.desk.record.free(job.key)
            except EndpointError as error:
                place = self._wanted[job.key][0][0]
                raise EndpointError(
                    error.message, where=f"prompt {place}, {error.where}", found=error.found, remedy=error.remedy
                ) from error

    def _again(self, job: _Job, failure: Failure) -> None:
        """Put a question off after a failed attempt, or give up."""
        now, patience = time.monotonic(), self.desk.patience
        job.attempts += 1
        if failure.wait:
            self.desk.limits.pause(failure.wait)  # it holds for every other question too
        seconds = patience.wait(job.key, job.attempts, failure.wait)
        if job.attempts >= patience.attempts or now + seconds - job.began > patience.seconds:
            times = "1 attempt" if job.attempts == 1 else f"{job.attempts} attempts"
            raise EndpointError(
                f"no answer after {times} in {now - job.began:.0f} s",
                where=f"prompt {self._wanted[job.key][0][0]}, {self.desk.endpoint.name}",
                found=failure.reason,
                remedy="see whether the server is up; attempts and patience say how long to try",
            )
        self._put_off(job, seconds)

    def _put_off(self, job: _Job, seconds: float) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), job))

    def _reuse(self, job: _Job) -> Answer:
        answer = self.desk.record.read(job.key)
        assert answer is not None
        with self.desk.counts.lock:
            self.desk.counts.reused += 1
        return answer

    def _settle(self, job: _Job, answer: Answer) -> None:
        """Hand an answer to all who want it."""
        for place, sample in self._wanted.pop(job.key):
            answers = self._open[place]
            answers[sample] = answer
            whole = [a for a in answers if a is not None]
            if len(whole) == len(answers):
                del self._open[place]
                self._finished.append((place, whole))
                self.done += 1
                self._report()

    def _report(self) -> None:
        desk = self.desk
        if desk.progress is not None:
            desk.progress(Progress(self.done, self.total, desk.counts.asked, desk.counts.reused, desk.record.spent))

    def _wait(self, seconds: float) -> None:
        seconds = min(seconds, _BEAT)
        if self._flight:
            wait(self._flight, timeout=seconds, return_when=FIRST_COMPLETED)
        else:
            self.stop.wait(seconds)

    def _drain(self, pool: ThreadPoolExecutor) -> None:
        """Ask nothing more, await what is under way, and leave no claim."""
        if self._claimed is not None and self._claimed not in self._flight.values():
            self.desk.record.free(self._claimed.key)
        pool.shutdown(wait=True, cancel_futures=True)
        for future, job in self._flight.items():
            if future.cancelled():
                self.desk.record.free(job.key)
            elif future.exception() is None:
                self._settle(job, future.result())
        self._flight.clear()

    def _dear(self, job: _Job) -> CapReached:
        money, record = self.desk.money, self.desk.record
        lost = f", {record.lost:.6g} of it at most by broken connections" if record.lost else ""
        return CapReached(
            "the spending cap is reached",
            where="cap",
            found=f"{record.spent:.6g} spent{lost}, and the next prompt may cost {money.most(job.question):.6g}",
            wanted=f"at most {money.cap:.6g} for the record {record.folder}",
            remedy="call again with a higher cap, and nothing is asked twice",
        )

    def _told(self, problem: LimbeckError) -> LimbeckError:
        """A problem that also says how far the call came."""
        of = "" if self.total is None else f" of {self.total}"
        kept = f"{self.done}{of} prompts are answered and kept; the same call goes on from there"
        remedy = kept if problem.remedy is None else f"{problem.remedy}; {kept}"
        return type(problem)(
            problem.message, where=problem.where, found=problem.found, wanted=problem.wanted, remedy=remedy
        )
