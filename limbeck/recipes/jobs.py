"""Several runs of a comparison at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from limbeck.core.catalogue import load_plugin
from limbeck.core.errors import ConfigError
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe

Task = tuple[str, Recipe, Path]  # what to call it, what to do, the run's folder


def run_all(tasks: Iterable[Task], jobs: int, *, teachers: Path, say: Callable[[str], None] | None = None) -> None:
    """Do runs, ``jobs`` at a time; finished ones are left alone. What each came to stands in its folder.

    The first is done alone, so that a teacher is trained once. Processors are shared out among the processes.

    Args:
        tasks: The runs.
        jobs: How many at a time.
        teachers: Where teachers that were trained first are kept.
        say: Told of each run when it is done.

    Raises:
        ConfigError: Fewer than one job.
        LimbeckError: Whatever the first run that failed said; runs under way are finished.
    """
    if jobs < 1:
        raise ConfigError("must be 1 or more", where="jobs", found=jobs)
    left = [task for task in tasks if not (task[2] / "result.json").is_file()]
    if jobs == 1 or len(left) < 2:
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    spawned = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch in an unknown state
    with ProcessPoolExecutor(min(jobs, len(left)), mp_context=spawned, initializer=_begin, initargs=(threads,)) as pool:
        first = pool.submit(_do, left[0], teachers)
        _told(first.result(), 1, len(left), say)
        waiting = [pool.submit(_do, task, teachers) for task in left[1:]]
        try:
            for done, future in enumerate(as_completed(waiting), start=2):
                _told(future.result(), done, len(left), say)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _told(name: str, done: int, number: int, say: Callable[[str], None] | None) -> None:
    if say is not None:
        say(f"run {done} of {number} done: {name}")


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def _do(task: Task, teachers: Path) -> str:
    name, recipe, folder = task
    for plugin in recipe.plugins:
        load_plugin(plugin)
    run(recipe, folder, resume=True, teachers=teachers, quiet=True)
    return name
