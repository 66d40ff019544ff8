"""Compression beside distillation: students cut from their teachers."""

from limbeck.compression.budget import Budget, Search
from limbeck.compression.layers import angular_block_scores, angular_distance, block_influence, choose_layers
from limbeck.compression.merging import slerp, slerp_merge
from limbeck.compression.report import ShrinkReport
from limbeck.compression.surgery import Shrunk, student_from
from limbeck.compression.units import measure_importance
from limbeck.compression.vocabulary import Vocabulary, most_frequent, pieced_rows, token_frequencies

__all__ = [
    "Budget",
    "Search",
    "ShrinkReport",
    "Shrunk",
    "Vocabulary",
    "angular_block_scores",
    "angular_distance",
    "block_influence",
    "choose_layers",
    "measure_importance",
    "most_frequent",
    "pieced_rows",
    "slerp",
    "slerp_merge",
    "student_from",
    "token_frequencies",
]
