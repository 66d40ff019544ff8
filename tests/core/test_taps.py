"""Listening: what is captured is what passes, and nobody notices the listener."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck.core.errors import TapError
from limbeck.core.survey import survey
from limbeck.core.taps import Listener, listen


class Net(nn.Module):
    """Two layers, a part that returns a tuple, one that returns a dict, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair, self.named, self.head = Pair(), Named(), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.first(x) * scale
        a, _, b = self.pair(self.shared(torch.relu(self.shared(x))))
        return self.head(self.named(value=a + b)["out"])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return x + 1, None, x * 2


class Named(nn.Module):
    def forward(self, *, value: Tensor) -> dict[str, Tensor]:
        return {"aside": value.detach() * 0, "out": value}


def test_every_kind_of_name() -> None:
    net, x = Net(), torch.randn(2, 4)
    first = net.first(x)
    once = net.shared(first)
    twice = net.shared(torch.relu(once))
    taps = [
        "first",
        "first@in",
        "shared#0",
        "shared#1",
        "shared@in#1",
        "pair[0]",
        "pair[2]",
        "named[1]",
        "named@in",
        ".",
    ]
    trace = listen(net, x, taps)
    wanted = [first, x, once, twice, torch.relu(once), twice + 1, twice * 2, twice * 3 + 1, twice * 3 + 1, net(x)]
    for tap, value in zip(taps, wanted, strict=True):
        assert torch.allclose(trace[tap], value), tap
    assert torch.equal(trace.logits, net(x))


def test_inputs_by_position_and_by_name() -> None:
    net, x = Net(), torch.randn(2, 4)
    for inputs in ((x, 2.0), {"x": x, "scale": 2.0}):
        assert torch.equal(listen(net, inputs, ["shared#0"])["shared#0"], net.shared(2 * net.first(x)))


def test_what_is_ambiguous_or_no_tensor_is_refused() -> None:
    net, x = Net(), torch.randn(2, 4)
    with pytest.raises(TapError, match="shared: this module runs 2 times in one forward; say which: shared#0"):
        listen(net, x, ["shared"])
    with pytest.raises(TapError, match=r"pair: no tensor passes there; found \['Tensor', 'NoneType', 'Tensor'\]"):
        listen(net, x, ["pair[1]"])


def test_gradients_pass_through_a_tap() -> None:
    net, x = Net(), torch.randn(2, 4)
    listen(net, x, ["first"])["first"].sum().backward()
    assert net.first.weight.grad is not None
    assert net.shared.weight.grad is None


def test_a_listener_costs_others_nothing_and_leaves_with_all_its_hooks() -> None:
    net, x = Net(), torch.randn(2, 4)
    plain, state = net(x), copy.deepcopy(net.state_dict())
    listener = Listener(net, ["first", "logits"], x)
    trace = listener(x)
    assert torch.equal(net(x), plain)
    assert torch.equal(listener(x + 1)["first"], net.first(x + 1))
    assert torch.equal(trace["first"], net.first(x))  # an older trace keeps what it said
    listener.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_two_listeners_on_one_model_do_not_disturb_each_other() -> None:
    net, x = Net(), torch.randn(2, 4)
    one, other = Listener(net, ["first"], x), Listener(net, ["pair[0]", "logits"], x)
    assert one(x).output is None
    trace = other(x)
    assert set(trace.taps) == {"pair[0]", "logits"}
    assert torch.equal(one(x)["first"], net.first(x))


def test_a_failed_forward_does_not_leave_the_listener_on() -> None:
    net, x = Net(), torch.randn(2, 4)
    listener = Listener(net, ["first", "logits"], x)
    with pytest.raises(RuntimeError):
        listener(torch.randn(2, 5))
    net(x)
    assert torch.equal(listener(x)["first"], net.first(x))


def test_a_place_that_runs_only_sometimes_is_an_error_when_it_does_not() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.extra(x) if len(x) > 1 else x)

    listener = Listener(Sometimes(), ["extra"], torch.zeros(2, 4))
    with pytest.raises(TapError, match="extra: this tap never fired in the forward; found 'extra' did not run"):
        listener(torch.zeros(1, 4))


class InPlace(nn.Module):
    """As in many networks, the ReLU writes over what batch norm returned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.head = nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(x)))


@pytest.mark.parametrize("taps", [["norm"], ["norm", "logits"], ["norm", "relu", "logits"]])
def test_a_value_the_model_overwrites_is_kept_as_it_was(taps: list[str]) -> None:
    model, x = InPlace(), torch.randn(8, 4)
    trace = Listener(model, taps, x)(x)
    assert torch.allclose(trace["norm"], (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(), atol=1e-6)
    assert (trace["norm"] < 0).any()
    (trace["norm"].square().sum() + (trace.logits.sum() if "logits" in taps else 0)).backward()
    assert model.norm.bias.grad.isfinite().all()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head, self.reentrant = nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("taps", [["body.1"], ["body.1", "logits"], ["body"], ["body.2", "penultimate", "logits"]])
def test_gradient_checkpointing_gives_the_same_gradients(taps: list[str]) -> None:
    model, x = Checkpointed(reentrant=False), torch.randn(3, 4)
    trace = Listener(model, taps, x)(x)
    loss = sum(trace[tap].square().sum() for tap in taps)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    hidden = torch.tanh(model.body[0](x))
    body = model.body[2](hidden)
    values = {"body.1": hidden, "body": body, "body.2": body, "penultimate": body, "logits": model.head(body)}
    plain = sum(values[tap].square().sum() for tap in taps)
    wanted = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    for (name, grad), value in zip(found.items(), wanted, strict=True):
        assert (grad is None) == (value is None), name
        assert grad is None or torch.allclose(grad, value), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_tap_cut_off_from_its_weights_is_refused() -> None:
    model, x = Checkpointed(reentrant=True), torch.randn(3, 4)
    with pytest.raises(TapError, match=r"body\.0: the captured value carries no gradient.*use_reentrant=False"):
        Listener(model, ["body.0", "logits"], x)(x)


def test_a_frozen_part_may_be_tapped_while_the_rest_trains() -> None:
    net, x = Net(), torch.randn(2, 4)
    net.first.requires_grad_(False)
    assert not listen(net, x, ["first"])["first"].requires_grad


@pytest.mark.parametrize(
    ("make", "taps"), [(Net, ["first", "pair[2]"]), (Net, ["logits"]), (InPlace, ["norm", "logits"])], ids=str
)
def test_taps_become_outputs_of_one_compiled_graph(make: Any, taps: list[str]) -> None:
    model, x = make(), torch.randn(8, 4)
    listener = Listener(model, taps, x)

    def run(inputs: Tensor) -> list[Tensor]:
        trace = listener(inputs)
        return [trace[tap] for tap in taps]

    model.eval()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    for value, wanted in zip(found, run(x), strict=True):
        assert torch.equal(value, wanted)


def test_a_survey_changes_nothing_and_lists_places_in_the_order_they_finish() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    places = survey(model, torch.ones(8, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert list(places) == ["0", "1", "2", "3", "."]
    assert (places["3"].inputs, places["3"].shape, places["3"].calls, places["3"].linear) == ((8, 4), (8, 2), 1, True)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_survey_that_fails_leaves_no_hook() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(RuntimeError):
        survey(model, torch.zeros(1, 5))
    assert not model._forward_hooks
    assert model.training
