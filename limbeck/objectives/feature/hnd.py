"""Head network distillation (HND): GHND at one layer, where the head of a split network ends."""

from __future__ import annotations

from limbeck.core.catalogue import Card, register
from limbeck.objectives.feature.ghnd import GHND, ghnd_loss

register(
    Card(
        key="hnd",
        name="HND",
        title="Head Network Distillation: Splitting Distilled Deep Neural Networks for Resource-Constrained Edge "
        "Computing Systems",
        year=2020,
        code="yoshitomo-matsubara/head-network-distillation",
        knowledge="feature",
        equation=r"\| f^S - f^T \|_2^2",
        use="For a student whose head is new (small, with a bottleneck to send over a network) and whose tail is the "
        "teacher's: learn the head, freeze the tail, labels are not needed.",
        defaults={"tap": "the first stage; name the layer at which the network is split"},
        evidence="parity",
        evidence_note="value and gradient of yoshitomo-matsubara/hnd-ghnd-object-detectors@7ebbe03 with its HND "
        "settings, the same sum as in yoshitomo-matsubara/head-network-distillation@abe1100",
        choices=(
            "The formula is GHND's with one layer, so the function and the class are.",
            "The mean over samples; the authors' code adds up the batch.",
            "In the paper the sum stands alone, for a student whose tail is the teacher's; beside the labels it is "
            "weighed by 1/1000, as OFD weighs the like sum.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=0.001,
    ),
    ghnd_loss,
    tap="stages:0",
)(GHND)
