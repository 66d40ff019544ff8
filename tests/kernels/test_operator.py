"""The fused losses as operators: memory, autograd's rules, autocast and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.core.errors import TensorError
from limbeck.core.top_k import TopK
from limbeck.kernels import FusedLoss, linear_divergence, linear_sparse_divergence
from limbeck.kernels.linear_divergence import _linear_divergence
from limbeck.kernels.linear_sparse_divergence import _linear_sparse_divergence

OPERATORS = {"linear_divergence": _linear_divergence, "linear_sparse_divergence": _linear_sparse_divergence}


def case(
    kind: str, places: int = 12, width: int = 4, classes: int = 30, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., FusedLoss], Tensor, Tensor]:
    """A loss of hidden states and weight, and these."""
    hidden = torch.randn(places, width, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, width, dtype=dtype).requires_grad_()
    teacher = torch.randn(places, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    if kind == "dense":
        return lambda h, w, **options: linear_divergence(h, w, *teacher, **options), hidden, weight
    top = TopK.of(teacher[0] @ teacher[1].t(), 3)
    return lambda h, w, **options: linear_sparse_divergence(h, w, top, **options), hidden, weight


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes (a view is none), also within the fused operators."""

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.seen = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "limbeck":
            with self:
                return OPERATORS[func._opname]._init_fn(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        self.seen += 1
        known = {part.untyped_storage().data_ptr() for part in tensors((args, kwargs))}
        for part in tensors(found):
            if part.untyped_storage().data_ptr() not in known:
                self.entries = max(self.entries, part.untyped_storage().nbytes() // part.element_size())
        return found


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in it."""
    return [part for part in torch.utils._pytree.tree_leaves(tree) if isinstance(part, Tensor)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_no_tensor_has_places_times_classes(kind: str, masked: bool) -> None:
    places, classes, width = 640, 700, 16
    loss, hidden, weight = case(kind, places, width, classes, torch.float32)
    mask, labels = torch.rand(places) < 0.9 if masked else None, torch.randint(0, classes, (places,))
    for temperature in (1.0, 2.0):
        with Largest() as watch:
            total = loss(
                hidden, weight, mask=mask, labels=labels, label_weight=0.5, temperature=temperature, chunk=32
            ).total
            total.backward()
        assert watch.seen > 100  # it did look inside
        assert watch.entries == max(32 * classes, classes * width)
    with Largest() as watch:
        (hidden @ weight.t()).log_softmax(-1).sum()
    assert watch.entries == places * classes  # it would have seen it


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_without_grad_no_gradient_is_made(kind: str) -> None:
    loss, hidden, weight = case(kind, 64, 40, 50)
    wanted = loss(hidden, weight).total
    with torch.no_grad(), Largest() as watch:
        found = loss(hidden, weight, chunk=5).total
    torch.testing.assert_close(found, wanted.detach())
    assert not found.requires_grad
    assert watch.entries < hidden.numel()  # neither gradient was made room for
    assert not loss(hidden.detach(), weight.detach()).total.requires_grad


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_gradient_is_scaled_by_what_follows(kind: str) -> None:
    loss, hidden, weight = case(kind)
    once = torch.autograd.grad(loss(hidden, weight).total, (hidden, weight))
    total = loss(hidden, weight).total
    for _ in range(2):  # as often as autograd is asked to keep what it needs
        found = torch.autograd.grad(3 * total, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, tuple(3 * part for part in once))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_backward_twice_and_second_derivatives_are_refused(kind: str) -> None:
    loss, hidden, weight = case(kind)
    total = loss(hidden, weight).total
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
    (gradient,) = torch.autograd.grad(loss(hidden, weight).total, (hidden,), create_graph=True)
    with pytest.raises(TensorError, match="no second derivative.*full logits"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_autocast_multiplies_in_its_dtype_and_keeps_the_inputs(kind: str) -> None:
    loss, hidden, weight = case(kind, 40, 16, 60, torch.float32)
    wanted = torch.autograd.grad(loss(hidden, weight).total, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(hidden, weight).total
        mixed = loss(hidden.bfloat16(), weight).total  # what a layer under autocast gives
    assert total.dtype == torch.float32
    assert mixed.item() == pytest.approx(total.item(), rel=0.02)
    found = torch.autograd.grad(total, (hidden, weight))
    for own, true in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert 0 < (own - true).norm() < 0.03 * true.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_operator_keeps_the_rules(kind: str) -> None:
    """What torch checks: schema, shapes without values, autograd's registration, and tracing."""
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    mask, labels = torch.rand(5) < 0.7, torch.randint(-1, 8, (5,))
    told = (mask, labels, torch.tensor(0.5), "jsd", 0.3, 2.0, 1.0, 2, torch.float32)
    if kind == "dense":
        given = (hidden, weight, bias, torch.randn(5, 4), torch.randn(8, 4), None, *told, torch.float32)
    else:
        given = (hidden, weight, bias, *TopK.of(torch.randn(5, 8), 2), *told)
    for wanted in ((True, True, True), (True, False, False)):
        parts = [part.detach().requires_grad_(w) for part, w in zip(given[:3], wanted, strict=True)]
        torch.library.opcheck(
            OPERATORS["linear_divergence" if kind == "dense" else "linear_sparse_divergence"],
            (*parts, *given[3:], *wanted),
            # The gradients that come out are for backward alone, and it refuses to differentiate them.
            test_utils=("test_schema", "test_faketensor"),
        )


class Student(nn.Module):
    """What stands before the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 30)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_compiled_it_is_one_node(kind: str, backend: str) -> None:
    student, inputs = Student(), torch.randn(12, 6)
    loss, _, _ = case(kind, 12, 4, 30, torch.float32)
    mask, labels = torch.rand(12) < 0.7, torch.randint(-1, 30, (12,))

    def step(x: Tensor) -> Tensor:
        return loss(
            student(x),
            student.head.weight,
            student_bias=student.head.bias,
            mask=mask,
            labels=labels,
            label_weight=0.5,
            divergence="jsd",
            temperature=2.0,
        ).total

    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([node for node in graph.graph.nodes if "limbeck" in str(node.target)])
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    wanted = torch.autograd.grad(step(inputs), list(student.parameters()))
    total = torch.compile(step, fullgraph=True, backend=count)(inputs)
    torch.testing.assert_close(torch.autograd.grad(total, list(student.parameters())), wanted)
    assert [len(nodes) for nodes in graphs] == [1]


def test_compiled_it_takes_any_number_of_places() -> None:
    teacher, weight = torch.randn(30, 5), torch.randn(30, 4, requires_grad=True)

    def step(hidden: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, other, teacher, mask=mask, divergence="reverse_kl").total

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for places in (7, 12, 19):
        given = torch.randn(places, 4, requires_grad=True), torch.randn(places, 5), torch.rand(places) < 0.7
        wanted = torch.autograd.grad(step(*given), (given[0], weight))
        torch.testing.assert_close(torch.autograd.grad(compiled(*given), (given[0], weight)), wanted)
