"""Mixture-of-experts teachers whose tokens ask other experts than the model itself would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import Trace

Choose = Callable[[Tensor, "Router"], Tensor]


@dataclass(frozen=True)
class Router:
    """One layer's router: what a hook on it needs.

    Args:
        name: Dotted, in the model.
        module: It gives logits ``[tokens, N]``, the weights of the chosen experts ``[tokens, k]``, and which.
        experts: N.
        chosen: k, the model's own.
        sums_to_one: The model scales the chosen experts' weights so.
    """

    name: str
    module: nn.Module
    experts: int
    chosen: int
    sums_to_one: bool


def routers_of(model: nn.Module, inputs: Any) -> list[Router]:
    """The routers of a transformers mixture of experts, in order (Mixtral, Qwen-MoE, OLMoE and their like).

    Args:
        model: With modules that have ``top_k`` and a ``weight [N, D]``, and give logits, weights and choices.
        inputs: An example of what it is called with; one run shows whether the routers are as is thought here.

    Raises:
        ModelError: There are none, or they choose in another way than by the largest probabilities.
    """
    found = []
    for name, module in model.named_modules():
        top_k, weight = getattr(module, "top_k", None), getattr(module, "weight", None)
        if isinstance(top_k, int) and isinstance(weight, Tensor) and weight.ndim == 2 and 0 < top_k <= len(weight):
            found.append(Router(name, module, len(weight), top_k, bool(getattr(module, "norm_topk_prob", True))))
    seen: dict[str, Any] = {}
    handles = [r.module.register_forward_hook(lambda _, __, o, n=r.name: seen.update({n: o})) for r in found]
    try:
        with dry(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = [router for router in found if _is_routing(seen.get(router.name), router)]
    if not found:
        raise ModelError(
            "this model has no routers that can be told what to choose",
            where="teacher",
            found=type(model).__name__,
            wanted="a mixture of experts of transformers such as Mixtral, Qwen3-MoE or OLMoE",
        )
    for router in found:
        logits, scores, indices = seen[router.name]
        own_scores, own = weighed(logits, top(logits, router.chosen), router)
        if not torch.equal(own, indices) or not torch.equal(own_scores.to(scores.dtype), scores):
            raise ModelError(
                "this router chooses in another way than by the largest probabilities",
                where=router.name,
                found=type(router.module).__name__,
                wanted="softmax, then the k largest",
            )
    return found


def _is_routing(output: Any, router: Router) -> bool:
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(t, Tensor) for t in output):
        return False
    logits, scores, indices = output
    return logits.shape[-1] == router.experts and scores.shape == indices.shape and scores.shape[-1] == router.chosen


def top(logits: Tensor, number: int) -> Tensor:
    """The most probable experts of each token, the most probable first: ``[tokens, number]``."""
    return logits.float().softmax(dim=-1).topk(number, dim=-1).indices


def every(logits: Tensor, router: Router) -> Tensor:
    """All experts, ``[tokens, N]``."""
    return top(logits, router.experts)


def drawn(logits: Tensor, number: int, chance: float) -> Tensor:
    """For each token the most probable experts, or, with a chance, as many drawn by their probability, none twice.

    Draws come from torch's global random state.

    >>> drawn(torch.tensor([[0.0, 3.0, 1.0]]), 2, 0.0)
    tensor([[1, 2]])
    """
    if not chance:
        return top(logits, number)
    logits = logits.float()
    # The largest of logits with Gumbel noise are a draw without replacement.
    noise = -(-torch.rand_like(logits).clamp(min=1e-20).log()).log()
    free = torch.rand(len(logits), 1, device=logits.device) < chance
    return torch.where(free, (logits + noise).topk(number, dim=-1).indices, top(logits, number))


def weighed(logits: Tensor, indices: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Weights of chosen experts ``[tokens, k]``, scaled as the model does, and which they are."""
    scores = logits.float().softmax(dim=-1).gather(1, indices)
    return (scores / scores.sum(dim=-1, keepdim=True) if router.sums_to_one else scores), indices


@contextlib.contextmanager
def routed(
    routers: Sequence[Router],
    choose: Choose,
    weights: Sequence[Mapping[str, Tensor]] | None = None,
    gates: list[Tensor] | None = None,
) -> Iterator[None]:
    """Let tokens ask other experts for as long as this lasts. Nothing in the model is changed.

    Args:
        routers: Of the model.
        choose: The experts ``[tokens, k]`` of each token, from the router's logits ``[tokens, N]``.
        weights: Parameters in the place of each router's own.
        gates: Gets each router's logits, in order.
    """
    handles = []
    for number, router in enumerate(routers):
        held = None if weights is None else weights[number]

        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            output: tuple[Tensor, Tensor, Tensor],
            router: Router = router,
            held: Mapping[str, Tensor] | None = held,
        ) -> tuple[Tensor, Tensor, Tensor] | None:
            logits = output[0]
            if held is not None:
                if any(module._parameters[name] is value for name, value in held.items()):
                    return None  # the call below
                logits = functional_call(module, dict(held), args)[0]
            if gates is not None:
                gates.append(logits)
            scores, indices = weighed(logits, choose(logits, router), router)
            return logits, scores.to(output[1].dtype), indices

        handles.append(router.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ExpertsTeacher(FrozenTeacher):
    r"""Knowledge augmentation: a mixture of experts that answers several times, each with nearly all of its experts.

    In each layer a token asks its most probable experts or, with a chance, as many drawn from the router's
    distribution without replacement:

    .. math:: y = \sum_{i \in S} \frac{g_i}{\sum_{j \in S} g_j} E_i(x), \qquad |S| = N - 1

    ``trace.members`` are the answers, the first of them the trace's own; with one pass there is no more than that.

    Args:
        model: A mixture of experts of transformers.
        passes: How often it answers; 2 in the paper.
        chance: That a token's experts are drawn; 0.05 in the paper.
        experts: How many a token asks; ``None``: all but one, as in the paper.
        logits: Where logits stand in its output.

    Raises:
        ConfigError: Numbers that cannot be.

    Source: "Every Expert Matters: Towards Effective Knowledge Distillation for Mixture-of-Experts Language Models",
        2025, arXiv 2502.12947.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        passes: int = 2,
        chance: float = 0.05,
        experts: int | None = None,
        logits: str | None = None,
    ) -> None:
        super().__init__(model, logits=logits)
        check_positive(passes, "passes")
        check_inside(chance, "chance", closed=True)
        if experts is not None:
            check_positive(experts, "experts")
        self.passes, self.chance, self.experts = passes, chance, experts
        self.routers: list[Router] = []

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        super().attach(taps, batch)
        self.routers = routers_of(self.model, teacher_inputs(batch))
        fewest = min(router.experts for router in self.routers)
        if self.experts is not None and self.experts > fewest:
            raise ConfigError(
                "more experts than there are", where="experts", found=self.experts, wanted=f"1 to {fewest}"
            )

    def choose(self, logits: Tensor, router: Router) -> Tensor:
        """A token's experts."""
        return drawn(logits, max(1, router.experts - 1) if self.experts is None else self.experts, self.chance)

    @torch.compiler.disable
    def __call__(self, batch: Batch) -> Trace:
        with routed(self.routers, self.choose):
            said = tuple(super(ExpertsTeacher, self).__call__(batch) for _ in range(self.passes))
        return said[0] if len(said) == 1 else Trace(None, said[0].taps, said[0]._where, members=said)


class EveryExpert(FrozenTeacher):
    """A mixture of experts of which each token asks all, by routers of its own.

    Args:
        model: A mixture of experts of transformers.
        logits: Where logits stand in its output.
    """

    def __init__(self, model: nn.Module, *, logits: str | None = None) -> None:
        super().__init__(model, logits=logits)
        self.routers: list[Router] = []
        self.weights: list[dict[str, nn.Parameter]] | None = None  # in the place of the routers' own

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        super().attach(taps, batch)
        self.routers = routers_of(self.model, teacher_inputs(batch))

    @torch.compiler.disable
    def __call__(self, batch: Batch) -> Trace:
        with routed(self.routers, every, self.weights):
            return super().__call__(batch)

    def learning(self, batch: Batch) -> tuple[Trace, list[Tensor]]:
        """What it says, with gradients to the routers' ``weights`` alone, and each router's logits ``[tokens, N]``."""
        if self.listener is None or self.weights is None:
            raise ModelError("nothing of it learns", where="teacher", remedy="attach it and give it weights first")
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        gates: list[Tensor] = []
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            self.model.eval()
            with routed(self.routers, every, self.weights, gates):
                return self.listener(teacher_inputs(batch)), gates
        finally:
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)
