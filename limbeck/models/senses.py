"""A dictionary of senses: for each token a few states, one of which a model means by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_tensors
from limbeck.core.reduction import widen
from limbeck.core.taps import Listener

Rule = Literal["dot", "cos", "l2"]


class SenseDictionary(nn.Module):
    """The senses of each token.

    Args:
        senses: ``[S, D]``, those of the first token, then those of the second, and so on.
        first: ``[V + 1]``, where the senses of each token begin; a token may have none.

    >>> senses = SenseDictionary.of([(3, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))])
    >>> ids, states = torch.tensor([3, 4]), torch.tensor([[0.2, 0.9], [0.2, 0.9]])
    >>> senses.known(ids), senses.replaced(ids, states)
    (tensor([ True, False]), tensor([[0.0000, 1.0000],
            [0.2000, 0.9000]]))
    """

    senses: Tensor
    first: Tensor

    def __init__(self, senses: Tensor, first: Tensor) -> None:
        super().__init__()
        # Not in checkpoints: it stays as it was built.
        self.register_buffer("senses", senses, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.most = int(first.diff().max()) if len(first) > 1 else 0

    @classmethod
    def of(cls, groups: Iterable[tuple[int, Tensor]]) -> SenseDictionary:
        """From tokens, by ascending id, with the senses ``[K, D]`` of each.

        Raises:
            DataError: There is none.
        """
        known = list(groups)
        if not known:
            raise DataError("there is no token with senses", where="senses")
        counts = torch.zeros(known[-1][0] + 1, dtype=torch.long)
        counts[torch.tensor([token for token, _ in known])] = torch.tensor([len(senses) for _, senses in known])
        return cls(torch.cat([senses for _, senses in known]), torch.nn.functional.pad(counts.cumsum(0), (1, 0)))

    @property
    def dim(self) -> int:
        """Width of a sense."""
        return self.senses.shape[1]

    def known(self, ids: Tensor) -> Tensor:
        """Which tokens have senses, as the ids are shaped."""
        return self._counts(ids) > 0

    def _counts(self, ids: Tensor) -> Tensor:
        own = ids.clamp(min=0, max=len(self.first) - 2)
        return (self.first[own + 1] - self.first[own]).masked_fill(own != ids, 0)

    def of_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The senses ``[N, K, D]`` of tokens ``[N]``, and which of these places hold one ``[N, K]``."""
        places = torch.arange(self.most, device=ids.device)
        there = places < self._counts(ids).unsqueeze(1)
        at = self.first[ids.clamp(min=0, max=len(self.first) - 2)].unsqueeze(1) + places
        return self.senses[at.clamp(max=len(self.senses) - 1)], there

    def chosen(self, ids: Tensor, states: Tensor, rule: Rule = "dot") -> Tensor:
        """The sense ``[N]`` that is nearest to each state ``[N, D]`` of tokens ``[N]`` that are known."""
        senses, there = self.of_tokens(ids)
        return likeness(states, senses, rule).masked_fill(~there, -torch.inf).argmax(dim=1)

    def replaced(self, ids: Tensor, states: Tensor, where: Tensor | None = None, rule: Rule = "dot") -> Tensor:
        """States ``[*, D]`` of tokens ``[*]`` as their nearest senses; a token without senses keeps its state.

        Args:
            ids, states: See above.
            where: ``[*]`` booleans: the others keep theirs, too.
            rule: What is near: the largest dot product, the largest cosine, or the smallest distance.
        """
        known = self.known(ids) if where is None else self.known(ids) & where
        own, asked = ids[known], states[known]
        found = self.of_tokens(own)[0][torch.arange(len(own), device=ids.device), self.chosen(own, asked, rule)]
        result = states.clone()
        result[known] = found.to(states.dtype)
        return result

    def save(self, file: str | os.PathLike[str], **more: Tensor) -> None:
        """Write it to a safetensors file, with further tensors by name."""
        tensors = {"senses": self.senses, "first": self.first, **more}
        write_tensors(Path(file), {name: t.detach().cpu().contiguous() for name, t in tensors.items()})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> tuple[SenseDictionary, dict[str, Tensor]]:
        """A dictionary from its file, and what else is in there.

        Raises:
            DataError: There is no such file, or it holds none.
        """
        try:
            tensors = load_file(file)
            return cls(tensors.pop("senses"), tensors.pop("first")), tensors
        except (OSError, KeyError, ValueError) as error:
            raise DataError("this is no dictionary of senses", where=str(file), found=str(error)) from error


def likeness(states: Tensor, senses: Tensor, rule: Rule = "dot") -> Tensor:
    """How near each of several senses ``[N, K, D]`` is to a state ``[N, D]``: the more, the nearer.

    Raises:
        ConfigError: No such rule.
    """
    states, senses = widen(states), widen(senses).to(widen(states).dtype)
    if rule == "dot":
        return torch.einsum("nkd,nd->nk", senses, states)
    if rule == "cos":
        return torch.nn.functional.cosine_similarity(senses, states.unsqueeze(1), dim=-1)
    if rule == "l2":
        return -(senses - states.unsqueeze(1)).square().sum(dim=-1)
    raise ConfigError("no such rule", where="rule", found=repr(rule), wanted=", ".join(get_args(Rule)))


class SenseStudent(nn.Module):
    """A student whose states are put into the senses of its teacher, and what is made of these.

    Args:
        student: Takes ``input_ids`` and ``attention_mask`` by keyword.
        tap: Where its states ``[B, T, D_s]`` are.
        adaptor: From them to the width of the senses.
        dictionary: The senses.
        head: Makes something of the senses ``[B, T, D]`` and of the mask ``[B, T]``, such as the teacher's pooler and
            classifier; ``None``: the mean of a text's senses, an embedding.
        rule: See :meth:`SenseDictionary.replaced`.
        skip: Token ids that keep their states.

    >>> from limbeck.models.text import TextEncoder
    >>> student, adaptor = TextEncoder(8, 2, vocabulary=9), nn.Linear(8, 4)
    >>> model = SenseStudent(student, "blocks:-1", adaptor, SenseDictionary.of([(3, torch.ones(2, 4))]))
    >>> model(torch.tensor([[3, 3, 0]]), torch.tensor([[1, 1, 0]]))
    tensor([[1., 1., 1., 1.]], grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        student: nn.Module,
        tap: str,
        adaptor: nn.Module,
        dictionary: SenseDictionary,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        rule: Rule = "dot",
        skip: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.student, self.adaptor, self.dictionary, self.head = student, adaptor, dictionary, head
        self.tap, self.rule, self.skip = tap, rule, tuple(skip)
        self._listener: Listener | None = None

    @classmethod
    def read(cls, student: nn.Module, file: str | os.PathLike[str], tap: str, **options: Any) -> SenseStudent:
        """With dictionary, adaptor and skipped tokens from the file that a run left."""
        dictionary, more = SenseDictionary.load(file)
        weight = more["adaptor.weight"]
        adaptor = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        adaptor.load_state_dict({"weight": weight, "bias": more["adaptor.bias"]})
        return cls(student, tap, adaptor, dictionary, skip=more["skip"].tolist(), **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self._listener is None:
            self._listener = Listener(self.student, [self.tap], inputs)
        states = self._listener(inputs)[self.tap]
        skipped = torch.isin(input_ids, torch.tensor(self.skip, dtype=input_ids.dtype, device=input_ids.device))
        meant = self.dictionary.replaced(input_ids, self.adaptor(states), (mask > 0) & ~skipped, self.rule)
        if self.head is not None:
            return self.head(meant, mask)
        there = (mask > 0).unsqueeze(-1).to(meant.dtype)
        return (meant * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
