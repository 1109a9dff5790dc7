"""Logistic probes: the linear detectors of all three methods, fitted by scikit-learn, applied in torch."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """P(harm | x) = sigmoid(<weight, x> + bias). weight: fp32 [features]; bias: fp32 scalar tensor."""

    weight: Tensor
    bias: Tensor

    def probability(self, x: Tensor) -> Tensor:
        """x [..., features], any float dtype -> fp32 [...]."""
        return torch.sigmoid(x.float() @ self.weight + self.bias)

    def to(self, device: torch.device) -> "Probe":
        """The same probe on another device."""
        return Probe(self.weight.to(device), self.bias.to(device))


def fit_probe(x: np.ndarray, y: np.ndarray, *, c: float = 1.0, pca: int | None = None, seed: int = 0) -> Probe:
    """Fit standardised (and, with `pca`, dimension-reduced) logistic regression and fold it into one linear probe.

    Args:
        x: [samples, features]. y: [samples], 1 = harmful. Classes are weighted equally.
        c: inverse regularisation strength, as in scikit-learn.
        pca: number of principal components kept, as in SAPT's released detector; None keeps all features.
    """
    steps: list = [StandardScaler()]
    if pca is not None:
        steps.append(PCA(pca, random_state=seed))
    steps.append(LogisticRegression(C=c, max_iter=2000, class_weight="balanced"))
    pipeline = make_pipeline(*steps).fit(np.asarray(x, np.float64), np.asarray(y))
    # Every step is affine, so the whole pipeline's logit is too: read its weight and bias off the steps.
    scaler, regression = pipeline[0], pipeline[-1]
    weight, bias = regression.coef_[0], float(regression.intercept_[0])
    if pca is not None:
        bias -= float(weight @ pipeline[1].components_ @ pipeline[1].mean_)
        weight = weight @ pipeline[1].components_
    weight = weight / scaler.scale_
    bias -= float(weight @ scaler.mean_)
    return Probe(torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32))
