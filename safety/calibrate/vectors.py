"""Revision vectors, their scales, and the ranking of heads (arXiv 2501.16378)."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from safety.detector import fit_probe
from safety.parts import RevisionArtifact

Side = Callable[[str, int], Tensor]  # ("layers", block) -> [samples, width]; ("heads", block) -> [samples, heads, dim]


def fit_revision(safe: Side, unsafe: Side, blocks: int, seed: int = 0, tick: Callable[[], None] = lambda: None
                 ) -> RevisionArtifact:
    """Vectors from contrasting activations, one block at a time: no more is held than one block of all samples.

    "mms" is mean(safe) - mean(unsafe): it points from unsafe to safe, whatever the paper's text says in one place
    (adding it must make answers safer). "pwd" is the direction of a probe's weights, scaled to the length of "mms" so
    that alpha means the same for both. Heads are ranked by their probe's accuracy on a held-out quarter.
    """
    vectors: dict[str, list[Tensor]] = {f"{level}_{kind}": [] for level in ("layer", "head") for kind in ("mms", "pwd")}
    scales: dict[str, list[Tensor]] = {name: [] for name in vectors}
    accuracy: list[list[float]] = []
    for block in range(blocks):
        for level in ("layer", "head"):
            good, bad = safe(f"{level}s", block), unsafe(f"{level}s", block)
            shift = good.mean(0) - bad.mean(0)
            if level == "layer":
                direction = _probe_direction(good, bad, shift, seed)[0]
            else:
                fits = [_probe_direction(good[:, h], bad[:, h], shift[h], seed) for h in range(good.shape[1])]
                direction = torch.stack([weights for weights, _ in fits])
                accuracy.append([score for _, score in fits])
            for kind, vector in (("mms", shift), ("pwd", direction)):
                vectors[f"{level}_{kind}"].append(vector)
                scales[f"{level}_{kind}"].append(_std_along(torch.cat([good, bad]), vector))
        tick()
    return RevisionArtifact({name: torch.stack(rows) for name, rows in vectors.items()},
                            {name: torch.stack(rows) for name, rows in scales.items()}, torch.tensor(accuracy))


def _probe_direction(safe: Tensor, unsafe: Tensor, mean_shift: Tensor, seed: int) -> tuple[Tensor, float]:
    """(probe weights, safe positive, as long as the mean shift; accuracy on a held-out quarter of the samples)."""
    x = torch.cat([safe, unsafe]).numpy()
    y = np.r_[np.ones(len(safe)), np.zeros(len(unsafe))]
    x_fit, x_test, y_fit, y_test = train_test_split(x, y, test_size=0.25, random_state=seed, stratify=y)
    probe = fit_probe(x_fit, y_fit, c=0.1)
    right = (probe.probability(torch.tensor(x_test)) >= 0.5).numpy() == (y_test == 1)
    direction = probe.weight / probe.weight.norm().clamp_min(1e-12) * mean_shift.norm()
    return direction, float(right.mean())


def _std_along(samples: Tensor, vectors: Tensor) -> Tensor:
    """Standard deviation of samples [n, …, d] along vectors […, d] of unit length: […]."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (samples * unit).sum(-1).std(0)
