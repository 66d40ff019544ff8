"""Federations in this process, or in all processes of a launcher: ``python ranks_run.py FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.memory import everywhere
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.ranks import mean_over_ranks, world_size
from limbeck.core.trace import Trace
from limbeck.engine.run import Run
from limbeck.schemes import build, perform
from limbeck.schemes.federated import fedavg
from limbeck.schemes.federated.owners import Owners
from tests.schemes.federated.scene import scene

AVERAGE = {"count": 3, "alpha": 1.0, "epochs": 1, "least": 8, "clients": "processes"}
SCORES = {"count": 3, "alpha": None, "epochs": 1, "start": 1, "start_public": 1, "least": 8, "fraction": 0.7}


class Cut(Exception):
    pass


class Shared(Objective):
    """A loss that elsewhere would wait for all ranks."""

    contract = Contract(normalizer="samples", at_equal=None)
    student_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> torch.Tensor:
        rows = everywhere(student.logits)[0].detach()
        return (student.logits.mean() - rows.mean()).square() + 0.1 * student.logits.square().mean() * mean_over_ranks(
            rows.new_tensor(2.0)
        )


def averaged(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Weights of a run in which client 1 is killed in the second round; tells which client trained on which rank."""
    learn, me, owned = fedavg.learn, os.getpid(), list[Owners]()

    def dies(model, loss, loader, place, **options):
        found = learn(model, loss, loader, place, **options)
        number = next(n for n, own in enumerate(owned[0].loaders) if own is loader)
        (folder / f"client-{number}-on-{rank}").touch()
        if place.number == 1 and number == 1 and os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    given = scene(count=60, epochs=3)
    given.loss = given.loss + Terms.of(Shared())
    given.student.insert(1, nn.BatchNorm1d(6))
    scheme = build("fedavg", **AVERAGE)
    make, fedavg.learn = scheme.server, dies

    def server(cast):
        found = make(cast)
        owned.append(found.owners)
        return found

    scheme.server = server
    perform(scheme, given, out=folder / "average", quiet=True)
    fedavg.learn = learn
    return given.student.state_dict()


def resumed(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a run that dies after its second round and goes on."""
    settings = {"count": 80, "epochs": 4, "checkpoint_every": 1, "validate_steps": 2}
    after, done = Run.after_step, list[int]()

    def counted(self):
        after(self)
        done.append(1)
        if len(done) == 2:
            raise Cut

    Run.after_step = counted
    try:
        perform(build("fedmd", **SCORES), scene(**settings), out=folder / "scores", quiet=True)
    except Cut:
        Run.after_step = after
    given = scene(**settings)
    perform(build("fedmd", **SCORES), given, out=folder / "scores", resume=True, quiet=True)
    return given.student.state_dict()


def main(folder: Path) -> None:
    """What every process ends with lies in ``average-RANK`` and ``scores-RANK``."""
    rank = int(os.environ.get("RANK", "0"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(averaged(folder, rank), folder / f"average-{rank}.safetensors")
    save_file(resumed(folder), folder / f"scores-{rank}.safetensors")
    assert world_size() == int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
