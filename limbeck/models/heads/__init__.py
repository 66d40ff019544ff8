"""Heads: what stands in the place of a model's last linear layer, is trained for some methods, and ships.

==============  ========================================================================================================
head            is
==============  ========================================================================================================
``subclass``    several logits a class, folded to one by log-sum-exp; ``head.sub`` are the logits before
``dual``        one linear layer for labels (``head.ce``), one for the teacher's answers (``head.kd``), mixed when it is
                used
``reused``      a projector (``head.projector``) into the teacher's feature space, and the teacher's own classifier
==============  ========================================================================================================

A method's card names the head it wants; comparisons, a recipe without ``student.head`` and ``limbeck.distill`` then put
it on. A recipe writes ``head: dual`` or ``head: {dual: {alpha: 0.3}}``, and ``head: linear`` for the model as it is.
"""

from limbeck.models.heads.dual import DualHead, dual_log_probabilities, search_dual, settle_head
from limbeck.models.heads.plan import Head
from limbeck.models.heads.put import PLAIN, HeadSpec, available_heads, check_head, head_of, put_head
from limbeck.models.heads.reused import Projected, ReusedHead
from limbeck.models.heads.subclass import SubclassHead
from limbeck.models.heads.wanted import common_options, fit_head, one_head, wanted_head

__all__ = [
    "PLAIN",
    "DualHead",
    "Head",
    "HeadSpec",
    "Projected",
    "ReusedHead",
    "SubclassHead",
    "available_heads",
    "check_head",
    "common_options",
    "dual_log_probabilities",
    "fit_head",
    "head_of",
    "one_head",
    "put_head",
    "search_dual",
    "settle_head",
    "wanted_head",
]
