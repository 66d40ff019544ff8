"""Clients in processes: the same bits as in one, and nothing lost but the round of one who dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError, TrainingError
from limbeck.engine import TrainConfig
from limbeck.schemes import build, perform
from limbeck.schemes.federated import clients, fedavg
from limbeck.schemes.federated.local import Round
from limbeck.schemes.federated.rounds import record
from limbeck.schemes.federated.wire import pack, unpack
from tests.schemes.federated.scene import scene

OPTIONS = {"count": 3, "alpha": 1.0, "epochs": 1, "least": 8}


def run(folder: Path, where: str, **options: object) -> dict[str, torch.Tensor]:
    given = scene(count=40, epochs=3)
    perform(build("fedavg", **OPTIONS, clients=where, **options), given, out=folder, quiet=True)
    return given.student.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_processes_give_the_bits_of_one(tmp_path):
    assert same(run(tmp_path / "one", "simulated"), run(tmp_path / "many", "processes"))
    first, second = record(tmp_path / "one"), record(tmp_path / "many")
    assert first == second
    assert len(first) == 3


def test_a_client_killed_in_a_round_is_lost_for_that_round_alone(tmp_path, monkeypatch):
    learn, me, pids = fedavg.learn, os.getpid(), tmp_path / "pids"

    def dies(model, loss, loader, place, **options):
        found = learn(model, loss, loader, place, **options)
        with pids.open("a") as file:
            file.write(f"{place.number} {os.getpid()}\n")
        if place.number == 1 and len(loader.only) == victim and os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)  # trained, and not a word sent yet
        return found

    sizes = [
        loader.shown
        for loader in next(build("fedavg", **OPTIONS).trainings(scene(count=40))).stages[0].distiller.owners.loaders
    ]
    victim = sizes[1]
    assert sizes.count(victim) == 1
    monkeypatch.setattr(fedavg, "learn", dies)
    survived = run(tmp_path / "run", "processes")
    lines = record(tmp_path / "run")
    assert [one["answered"] for one in lines] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert lines[1]["lost"] == [{"client": 1, "why": "killed by signal 9"}]
    assert not lines[2]["lost"]
    assert lines[1]["down"].keys() == {"0", "1", "2"}
    assert lines[1]["up"].keys() == {"0", "2"}
    workers = {line.split()[1] for line in pids.read_text().splitlines()}
    assert len(workers) == 4
    assert str(me) not in workers

    monkeypatch.setattr(fedavg, "learn", learn)
    ask = clients.Simulated.ask

    def absent(self, place, kept, told):
        return ask(self, place, kept, {n: t for n, t in told.items() if (place.number, n) != (1, 1)})

    monkeypatch.setattr(clients.Simulated, "ask", absent)
    assert same(survived, run(tmp_path / "without", "simulated"))


class Quick(clients.Work):
    """Clients that answer at once; one fails in the first round, one sleeps in the second."""

    hears = says = ("x",)

    def answer(self, number, kept, told, place):
        if (number, place.number) == (0, 0):
            raise ValueError("no more disk")
        if (number, place.number) == (2, 1):
            time.sleep(600)
        return {"rounds": kept["rounds"] + 1}, {"x": told["x"] * (number + 1)}


def test_one_who_fails_or_is_late_is_lost_and_says_why():
    work, told = Quick(), {n: pack({"x": torch.ones(2)}) for n in range(3)}
    kept = {n: {"rounds": torch.tensor(0)} for n in range(3)}
    lost, answered = [], []
    processes = clients.Processes(work, timeout=3.0)
    try:
        for number in range(3):
            found = processes.ask(Round.of(number, 3, 0, TrainConfig()), kept, told)
            kept |= found.kept
            lost.append(found.lost)
            answered.append({n: unpack(said)["x"].tolist() for n, said in found.said.items()})
    finally:
        processes.close()
    assert lost == [{0: "ValueError: no more disk"}, {2: "no answer within 3 s"}, {}]
    assert answered[2] == {0: [1.0, 1.0], 1: [2.0, 2.0], 2: [3.0, 3.0]}
    assert [found.keys() for found in answered[:2]] == [{1, 2}, {0, 1}]
    assert {n: int(one["rounds"]) for n, one in kept.items()} == {0: 2, 1: 3, 2: 2}  # a lost round leaves no trace


def test_a_round_that_nobody_answers_ends_the_run(tmp_path, monkeypatch):
    def dies(self, number, kept, told, place):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(fedavg.Averaging, "answer", dies)
    with pytest.raises(TrainingError, match=r"round 1: no client answered.*client 2: killed by signal 9"):
        run(tmp_path / "run", "processes")


def test_no_process_is_left_behind(tmp_path, monkeypatch):
    started = []
    start = clients.Processes._start

    def noted(self, number):
        found = start(self, number)
        started.append(found[0])
        return found

    monkeypatch.setattr(clients.Processes, "_start", noted)
    run(tmp_path / "run", "processes")
    assert len({process.pid for process in started}) == 3
    assert not any(process.is_alive() for process in started)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients": "threads"}, "scheme.clients"),
        ({"count": 0}, "scheme.count"),
        ({"fraction": 1.5}, "scheme.fraction"),
        ({"timeout": -1.0}, "scheme.timeout"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        build("fedavg", **options)


@pytest.mark.parametrize("key", ["fedavg", "fedmd", "knfu", "fedlgd"])
def test_a_recipe_is_checked_by_few_samples_and_only_a_run_splits_them(key, tmp_path):
    from limbeck.recipes import check, load
    from limbeck.recipes import run as run_recipe

    few = [
        "data.samples=30",
        "data.batch_size=10",
        "teacher=null",
        "student={model: mlp_4}",
        "loss=cross_entropy",
        "train={steps: 1}",
    ]
    recipe = [*few, f"scheme={{{key}: {{count: 9}}}}"]
    assert check("digits", recipe) == []
    with pytest.raises(DataError, match=r"scheme\.count: there are not enough samples"):
        run_recipe(load("digits", recipe), tmp_path / "run", quiet=True)
    wrong = check("digits", [*few[:2], few[3], "loss=kd", "train={steps: 1}", f"scheme={{{key}: {{}}}}"])
    assert wrong
