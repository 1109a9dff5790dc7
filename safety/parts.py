"""The parts of a model's artifacts: what each defense needs, checked against the model when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from safety.detector import Probe
from safety.errors import UserError
from safety.lvlm import LVLM
from safety.settings import Sasa

Tensors = Mapping[str, Tensor]
MAX_SOFT_TOKENS = 512  # each check runs them all


@dataclass
class SasaArtifact:
    """probes: {(safety block, fused block): probe on the projected stream's first-token logits [vocabulary]};
    clean: the same on the clean stream's logits (mode "probe"); thresholds: the calibrated one of each way to judge,
    {"20-22": …, "clean": …, "per-input": …, "reading": …}, since probabilities of different probes are not alike;
    reading: probe on four post-norm last states in a row [4 * width] (mode "reading"): of the request, and as text,
    without the picture, of what is in its picture in words, of the prompt, and of the words above the prompt (without a
    picture all four are the request's). None where there was nothing to read."""

    probes: dict[tuple[int, int], Probe]
    clean: Probe
    thresholds: dict[str, float] = field(default_factory=dict)
    reading: Probe | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (safety, fused) blocks that can be chosen: those with a probe."""
        return sorted(self.probes)

    def threshold(self, settings: Sasa) -> float:
        """The calibrated threshold of the settings' way to judge; their own where none was calibrated."""
        return self.thresholds.get(settings.way, settings.threshold)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        probes = {f"{s}-{f}": probe for (s, f), probe in self.probes.items()} | {"clean": self.clean}
        return {**_probe_tensors(probes | ({"reading": self.reading} if self.reading else {})),
                **{f"{way}.threshold": torch.tensor([value], dtype=torch.float64)
                   for way, value in self.thresholds.items()}}

    @classmethod
    def read(cls, tensors: Tensors, lvlm: LVLM) -> "SasaArtifact":
        """From what was stored; raises UserError where it does not fit the model."""
        names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        features = {name: 4 * lvlm.width if name == "reading" else lvlm.vocabulary for name in names}
        probes = {name: _read_probe(tensors, name, count, lvlm.device) for name, count in features.items()}
        clean, reading = probes.pop("clean"), probes.pop("reading", None)
        thresholds = {name.removesuffix(".threshold"): _share(name, float(value)) for name, value in tensors.items()
                      if name.endswith(".threshold")}
        pairs = {(int(name.split("-")[0]), int(name.split("-")[1])): probe for name, probe in probes.items()}
        for pair in pairs:
            Sasa(*pair).check(lvlm.blocks)
        return cls(pairs, clean, thresholds, reading)


@dataclass
class RevisionArtifact:
    """vectors: {"layer_mms": [blocks, width], "head_mms": [blocks, heads, head_dim], … "pwd"}, safe minus unsafe;
    scales: the same keys, [blocks] and [blocks, heads]: standard deviation of the activations along the vector;
    accuracy: [blocks, heads] of each head's probe on held-out samples."""

    KINDS: ClassVar = ("mms", "pwd")

    vectors: dict[str, Tensor]
    scales: dict[str, Tensor]
    accuracy: Tensor

    @property
    def layers(self) -> list[int]:
        """The blocks that can be revised."""
        return list(range(len(self.accuracy)))

    def vector(self, level: str, vector: str, layer: int) -> Tensor:
        """[width] for level "layer", [heads, head_dim] for level "head"."""
        return self.vectors[f"{level}_{vector}"][layer]

    def scale(self, level: str, vector: str, layer: int) -> Tensor:
        """[] for level "layer", [heads] for level "head"."""
        return self.scales[f"{level}_{vector}"][layer]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"accuracy": self.accuracy, **{f"vector.{k}": v for k, v in self.vectors.items()},
                **{f"scale.{k}": v for k, v in self.scales.items()}}

    @classmethod
    def read(cls, tensors: Tensors, lvlm: LVLM) -> "RevisionArtifact":
        """From what was stored; raises UserError where it does not fit the model."""
        vectors = {k.removeprefix("vector."): v.float() for k, v in tensors.items() if k.startswith("vector.")}
        scales = {k.removeprefix("scale."): v.float() for k, v in tensors.items() if k.startswith("scale.")}
        shapes = {"layer": (lvlm.blocks, lvlm.width), "head": (lvlm.blocks, lvlm.heads, lvlm.head_dim)}
        for level, shape in shapes.items():
            for kind in cls.KINDS:
                _check_shape(f"vector.{level}_{kind}", vectors[f"{level}_{kind}"], shape)
                _check_shape(f"scale.{level}_{kind}", scales[f"{level}_{kind}"], shape[:-1])
        _check_shape("accuracy", tensors["accuracy"], (lvlm.blocks, lvlm.heads))
        return cls(vectors, scales, tensors["accuracy"].float())


@dataclass
class SaptArtifact:
    """soft: fp32 [length, width] soft prompt; detectors: {"joint": probe, "frozen": probe} on [width] states."""

    soft: Tensor
    detectors: dict[str, Probe]

    @property
    def length(self) -> int:
        """Number of soft tokens."""
        return self.soft.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"soft": self.soft, **_probe_tensors(self.detectors)}

    @classmethod
    def read(cls, tensors: Tensors, lvlm: LVLM) -> "SaptArtifact":
        """From what was stored; raises UserError where it does not fit the model."""
        soft = tensors["soft"].float()
        _check_shape("soft", soft, (min(max(soft.shape[0], 1), MAX_SOFT_TOKENS), lvlm.width))
        return cls(soft.to(lvlm.device), {name: _read_probe(tensors, name, lvlm.width, lvlm.device)
                                          for name in ("joint", "frozen") if f"{name}.weight" in tensors})


@dataclass
class TraceArtifact:
    """probe: on the post-norm state [width] from which a token is chosen; threshold: where a line is drawn; memory in
    [0, 1): how much of the log-odds so far is kept at each token (0: every token is judged alone)."""

    probe: Probe
    threshold: float
    memory: float = 0.0

    def follow(self, before: float | None, log_odds: float) -> float:
        """Running log-odds of harm after one more token; `before` is None at an answer's first token."""
        return log_odds if before is None else self.memory * before + (1 - self.memory) * log_odds

    def tensors(self) -> dict[str, Tensor]:
        """What is stored as tensors; the threshold is a setting."""
        return {**_probe_tensors({"trace": self.probe}), "memory": torch.tensor(self.memory)}

    @classmethod
    def read(cls, tensors: Tensors, lvlm: LVLM, threshold: float) -> "TraceArtifact":
        """From what was stored; raises UserError where it does not fit the model."""
        memory = float(tensors["memory"]) if "memory" in tensors else 0.0
        if not 0 <= memory < 1:
            raise UserError(f"The trace's memory must lie between 0 and 1, but it is {memory:g}. Calibrate again.")
        return cls(_read_probe(tensors, "trace", lvlm.width, lvlm.device), _share("trace_threshold", threshold), memory)


@dataclass
class LayersArtifact:
    """One probe for each block, on its output at the last prompt position: weight [blocks, width], bias [blocks];
    auroc [blocks]: how well each tells harmful from benign on validation samples."""

    weight: Tensor
    bias: Tensor
    auroc: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"weight": self.weight, "bias": self.bias, "auroc": self.auroc}

    @classmethod
    def read(cls, tensors: Tensors, lvlm: LVLM) -> "LayersArtifact":
        """From what was stored; raises UserError where it does not fit the model."""
        _check_shape("weight", tensors["weight"], (lvlm.blocks, lvlm.width))
        for name in ("bias", "auroc"):
            _check_shape(name, tensors[name], (lvlm.blocks,))
        return cls(*(tensors[name].float().to(lvlm.device) for name in ("weight", "bias", "auroc")))


def _probe_tensors(probes: Mapping[str, Probe]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": tensor for name, probe in probes.items()
            for kind, tensor in (("weight", probe.weight), ("bias", probe.bias))}


def _read_probe(tensors: Tensors, name: str, features: int, device: torch.device) -> Probe:
    weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
    _check_shape(name, weight, (features,))
    _check_shape(f"{name}.bias", bias.reshape(-1), (1,))
    return Probe(weight, bias.reshape(())).to(device)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"The artifacts' {name} must lie between 0 and 1, but it is {value:g}. Calibrate again.")
    return value


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"The artifact tensor {name!r} has shape {tuple(tensor.shape)}, but this model needs {shape}. "
                        "Calibrate for this model.")
