"""What two processes agree on: each writes what it found; see ``test_ranks.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist

from limbeck.core.ranks import as_on_first, drawn_alike, mean_gradients, rows_of_ranks


def loss(features: torch.Tensor) -> torch.Tensor:
    """One of the whole batch: every row against every other."""
    return (features @ features.T).softmax(dim=1).square().sum()


def main(folder: Path) -> None:
    rank, cpu = dist.get_rank(), torch.device("cpu")
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows_of_ranks(3 - rank, cpu)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gathered = rows.gather(inputs[rows.own] * weight)
    value = rows.of_whole(loss(gathered))
    value.backward()
    found = {"own": [rows.own.start, rows.own.stop], "gathered": gathered.detach(), "value": value.detach()}
    found |= {"gradient": weight.grad, "mask": rows.gather(torch.full((3 - rank,), rank))}
    # A step inside, and a loss after it: both have a part on each process.
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    own = inputs[rows.own]
    (inner,) = torch.autograd.grad((own @ weight).pow(3).mean() * rows.share, weight, create_graph=True)
    (mean,) = mean_gradients([inner])
    ((own @ (weight - 0.1 * mean)).pow(2).mean() * rows.share).backward()
    found |= {"mean": mean.detach(), "unrolled": weight.grad}
    with drawn_alike(cpu, 3, 4):
        found["drawn"] = rows.rand(2 * (3 - rank), 2, device=cpu)
    kept = [torch.full((2, 2), float(rank)), torch.tensor(rank), torch.full((3,), 1.0 + rank)]
    as_on_first(kept)
    found["kept"] = kept
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=int(sys.argv[2]), world_size=2)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
