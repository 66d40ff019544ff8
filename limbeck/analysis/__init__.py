"""What was transferred: fidelity, calibration, similarity of layers, accuracy by class."""

from limbeck.analysis.assess import assess
from limbeck.analysis.calibration import Calibration, brier, nll
from limbeck.analysis.cka import CKA, linear_cka
from limbeck.analysis.exposure import Canary, canary_exposure, exposure
from limbeck.analysis.fidelity import Fidelity, agreement, js, kl
from limbeck.analysis.loyalty import label_loyalty, probability_loyalty, regression_loyalty
from limbeck.analysis.per_class import PerClass

__all__ = [
    "CKA",
    "Calibration",
    "Canary",
    "Fidelity",
    "PerClass",
    "agreement",
    "assess",
    "brier",
    "canary_exposure",
    "exposure",
    "js",
    "kl",
    "label_loyalty",
    "linear_cka",
    "nll",
    "probability_loyalty",
    "regression_loyalty",
]
