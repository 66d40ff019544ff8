"""Losses fused with what stands before them, as custom operators that ``torch.compile`` sees as one node.

``linear_divergence`` and ``linear_sparse_divergence`` take hidden states and heads instead of logits, and never hold
logits of all places.
"""

from limbeck.kernels.linear_divergence import linear_divergence
from limbeck.kernels.linear_sparse_divergence import linear_sparse_divergence
from limbeck.kernels.operator import FusedLoss

__all__ = ["FusedLoss", "linear_divergence", "linear_sparse_divergence"]
