"""Controls of partial knowledge: named alone, and KD but for what the target holds."""

from __future__ import annotations

import pytest

from limbeck.core.errors import ConfigError
from limbeck.recipes.entries import PARTIAL_CONTROLS, control, controls_of, entries_of, method
from limbeck.recipes.schema import usual


@pytest.mark.parametrize("name", PARTIAL_CONTROLS)
def test_they_are_kd_with_another_target(name: str) -> None:
    entry = control(name)
    assert (entry.role, entry.key, entry.entry) == ("control", "understanding_kd", name)
    assert entry.loss["understanding_kd"].options == {"part": name.removeprefix("kd_")}
    weights = {key.replace("understanding_kd", "kd"): term.weight for key, term in entry.loss.items()}
    assert weights == usual("kd")
    default = method("kd").loss["kd"].options.get("temperature", 4.0)
    assert entry.loss["understanding_kd"].options.get("temperature", 4.0) == default
    assert [e.entry for e in entries_of(["dkd"], [name])] == [name, "dkd"]


def test_they_run_where_they_are_named_and_there_is_a_teacher() -> None:
    assert not set(controls_of(True, teacher=True)) & set(PARTIAL_CONTROLS)
    assert controls_of(["kd_pt"], teacher=True) == ["kd_pt"]
    with pytest.raises(ConfigError, match="needs a teacher"):
        controls_of(["kd_sim"], teacher=False)
    with pytest.raises(ConfigError, match="no such control"):
        control("kd_pt", "multilabel")
