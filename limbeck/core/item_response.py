"""Item response theory: which questions tell respondents apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import TensorError

_NODES = 41  # of the quadrature over abilities, from -5 to 5


def fit_two_parameters(right: Tensor, *, steps: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    r"""The two-parameter logistic model of who answers what rightly, by marginal likelihood.

    .. math:: P(\text{right}_{mi}) = \sigma\big(a_i (\theta_m - b_i)\big), \qquad
        \max_{a, b} \sum_m \log \int \prod_i P(\text{right}_{mi} \mid \theta)\, \mathcal{N}(\theta)\, d\theta +
        \log \mathcal{N}(b) + \log \mathcal{N}(\log a)

    The priors settle what few answers leave open, such as questions that all or none can answer.

    Args:
        right: ``[M, N]`` booleans, respondents by questions.
        steps: Of L-BFGS at most.

    Returns:
        Discrimination a ``[N]``, difficulty b ``[N]`` and the expected ability theta ``[M]``, in double precision.

    Raises:
        TensorError: No table of booleans.

    Source: Bock and Aitkin, Marginal Maximum Likelihood Estimation of Item Parameters, Psychometrika 46, 1981.

    >>> right = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    >>> a, _, theta = fit_two_parameters(right)  # the third tells nothing of the first two
    >>> int(a.argmin()), int(theta.argmax())
    (2, 1)
    """
    if right.dtype != torch.bool or right.ndim != 2 or not right.numel():
        found = f"{list(right.shape)} {right.dtype}"
        raise TensorError("no table of answers", where="right", found=found, wanted="booleans [M, N]")
    told = right.double().cpu()
    nodes = torch.linspace(-5, 5, _NODES, dtype=torch.double)
    weights = (-0.5 * nodes.square()).log_softmax(dim=0)
    b, log_a = (torch.zeros(told.shape[1], dtype=torch.double, requires_grad=True) for _ in range(2))
    solver = torch.optim.LBFGS([b, log_a], max_iter=steps, line_search_fn="strong_wolfe")

    def posterior() -> Tensor:
        """Log-probability of each respondent's answers together with each ability, ``[M, K]``."""
        scores = log_a.exp() * (nodes.unsqueeze(1) - b)
        return told @ F.logsigmoid(scores).T + (1 - told) @ F.logsigmoid(-scores).T + weights

    def loss() -> Tensor:
        solver.zero_grad()
        value = 0.5 * (b.square().sum() + log_a.square().sum()) - posterior().logsumexp(dim=1).sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        theta = posterior().softmax(dim=1) @ nodes
    return log_a.detach().exp(), b.detach(), theta
