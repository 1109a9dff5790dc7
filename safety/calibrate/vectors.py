"""Revision vectors, their scales, and the ranking of heads (arXiv 2501.16378)."""

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from safety.artifacts import RevisionArtifact
from safety.detector import fit_probe


def fit_revision(safe_layers: Tensor, unsafe_layers: Tensor, safe_heads: Tensor, unsafe_heads: Tensor,
                 seed: int = 0) -> RevisionArtifact:
    """Vectors from contrasting activations (Multi-Response: same image and question, safe and unsafe answer).

    Args:
        safe_layers, unsafe_layers: [samples, blocks, width]; safe_heads, unsafe_heads: [samples, blocks, heads, dim].

    "mms" is mean(safe) - mean(unsafe): it points from unsafe to safe, whatever the paper's text says in one place
    (adding it must make answers safer). "pwd" is the direction of a probe's weights, scaled to the length of "mms" so
    that alpha means the same for both. Heads are ranked by their probe's accuracy on a held-out quarter.
    """
    vectors = {"layer_mms": safe_layers.mean(0) - unsafe_layers.mean(0),
               "head_mms": safe_heads.mean(0) - unsafe_heads.mean(0)}
    blocks, heads = safe_heads.shape[1:3]
    vectors["layer_pwd"] = torch.stack([
        _probe_direction(safe_layers[:, b], unsafe_layers[:, b], vectors["layer_mms"][b], seed)[0]
        for b in range(blocks)])
    fits = [[_probe_direction(safe_heads[:, b, h], unsafe_heads[:, b, h], vectors["head_mms"][b, h], seed)
             for h in range(heads)] for b in range(blocks)]
    vectors["head_pwd"] = torch.stack([torch.stack([direction for direction, _ in row]) for row in fits])
    accuracy = torch.tensor([[score for _, score in row] for row in fits])
    everything = {"layer": torch.cat([safe_layers, unsafe_layers]), "head": torch.cat([safe_heads, unsafe_heads])}
    scales = {name: _std_along(everything[name.split("_")[0]], vector) for name, vector in vectors.items()}
    return RevisionArtifact(vectors, scales, accuracy)


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
