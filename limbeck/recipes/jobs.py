"""Several runs of a comparison at a time, each in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from limbeck.core.catalogue import load_plugin
from limbeck.core.errors import ConfigError
from limbeck.recipes.attempt import Failed, attempt, is_over
from limbeck.recipes.schema import Recipe

Task = tuple[str, Recipe, Path]  # what to call it, what to do, the run's folder

_GRACE = 5.0  # seconds in which runs stop by themselves: Ctrl-C in a terminal reaches all its processes


def run_all(tasks: Iterable[Task], jobs: int, *, teachers: Path, say: Callable[[str], None] | None = None) -> None:
    """Do runs, ``jobs`` at a time; finished ones are left alone. What each came to stands in its folder.

    The first is done alone, so that a teacher is trained once. Processors are shared out among the processes. Where
    this process is interrupted, runs under way stop with a checkpoint; where it is killed, they end with it.

    Args:
        tasks: The runs.
        jobs: How many at a time.
        teachers: Where teachers that were trained first are kept.
        say: Told of each run when it is done.

    Raises:
        ConfigError: Fewer than one job.
        LimbeckError: What is wrong with more than one run's training; runs under way are finished.
    """
    if jobs < 1:
        raise ConfigError("must be 1 or more", where="jobs", found=jobs)
    left = [task for task in tasks if not is_over(task[2])]
    if jobs == 1 or len(left) < 2:
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    spawned = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch in an unknown state
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(min(jobs, len(left)), mp_context=spawned, initializer=_begin, initargs=(threads,)) as pool:
        waiting, done = iter(left), 0
        running: set[Future[str]] = set()
        try:
            while done < len(left):
                # Never more than are done at a time: what a pool has queued it does, whatever happens here.
                for task in itertools.islice(waiting, (jobs if done else 1) - len(running)):
                    running.add(pool.submit(_do, task, teachers))
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    done += 1
                    _told(future.result(), done, len(left), say)
        except (KeyboardInterrupt, SystemExit):
            _stop(running, [p for p in multiprocessing.active_children() if p not in before])
            raise


def _stop(running: set[Future[str]], workers: list[BaseProcess]) -> None:
    """Have what is under way write a checkpoint and stop, where it does not do so by itself."""
    try:
        wait(running, timeout=_GRACE)
    finally:
        for worker in workers:
            worker.terminate()


def _told(name: str, done: int, number: int, say: Callable[[str], None] | None) -> None:
    if say is not None:
        say(f"run {done} of {number} done: {name}")


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without its parent a worker would finish its run, and then wait for the next one for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Task, teachers: Path) -> str:
    name, recipe, folder = task
    for plugin in recipe.plugins:
        load_plugin(plugin)
    try:
        attempt(recipe, folder, teachers=teachers, quiet=True)
    except Failed as reason:
        return f"{name} (failed: {reason})"
    return name
