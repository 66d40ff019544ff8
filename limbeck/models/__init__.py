"""Models: limbeck's own zoo, loading from anywhere, weights in files, what a model costs."""

from limbeck.models.describe import flops, latency, parameters
from limbeck.models.heads import head_of, put_head, settle_head
from limbeck.models.load import load_model
from limbeck.models.weights import Misfits, load_weights, save_weights
from limbeck.models.zoo import available, create

__all__ = [
    "Misfits",
    "available",
    "create",
    "flops",
    "head_of",
    "latency",
    "load_model",
    "load_weights",
    "parameters",
    "put_head",
    "save_weights",
    "settle_head",
]
