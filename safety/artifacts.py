"""What calibration produces for one model: one safetensors file per defense and a config.json. Never pickle.

config.json holds the model's fingerprint, the sha256 of every tensor file, the recommended settings of each defense,
and how it was all made (sample recipe, metrics, date, library versions). Loading checks all of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from safety.detector import Probe
from safety.errors import UserError
from safety.lvlm import LVLM, MINIATURE
from safety.settings import Lane, Revision, Sapt, Sasa

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent.parent / "artifacts"
LANES = ("none", "sasa", "revision", "sapt", "all")


@dataclass
class SasaArtifact:
    """probes: {(safety block, fused block): probe on the projected stream's first-token logits [vocabulary]};
    clean: the same on the clean stream's logits (mode "probe")."""

    probes: dict[tuple[int, int], Probe]
    clean: Probe

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (safety, fused) blocks that can be chosen: those with a probe."""
        return sorted(self.probes)


@dataclass
class RevisionArtifact:
    """vectors: {"layer_mms": [blocks, width], "head_mms": [blocks, heads, head_dim], … "pwd"}, safe minus unsafe;
    scales: the same keys, [blocks] and [blocks, heads]: standard deviation of the activations along the vector;
    accuracy: [blocks, heads] of each head's probe on held-out samples."""

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


@dataclass
class SaptArtifact:
    """soft: fp32 [length, width] soft prompt; detectors: {"joint": probe, "frozen": probe} on [width] states."""

    soft: Tensor
    detectors: dict[str, Probe]

    @property
    def length(self) -> int:
        """Number of soft tokens."""
        return self.soft.shape[0]


@dataclass
class TraceArtifact:
    """probe: P(harm) of the post-norm state [width] from which a token is chosen; threshold: where a line is drawn."""

    probe: Probe
    threshold: float


@dataclass
class Settings:
    """Recommended settings, as calibrated; None where the part is absent."""

    sasa: Sasa | None = None
    revision: Revision | None = None
    sapt: Sapt | None = None


@dataclass
class Artifacts:
    """Everything calibrated for one model. Parts that were not calibrated are None."""

    sasa: SasaArtifact | None = None
    revision: RevisionArtifact | None = None
    sapt: SaptArtifact | None = None
    trace: TraceArtifact | None = None
    settings: Settings = field(default_factory=Settings)
    about: dict[str, Any] = field(default_factory=dict)

    def standard_lanes(self, names: str) -> list[Lane]:
        """Lanes by name, comma-separated out of none, sasa, revision, sapt and all, with the calibrated settings.

        Raises:
            UserError: an unknown or repeated name, or a defense that is not calibrated.
        """
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if not wanted:
            raise UserError(f"Name at least one lane out of {', '.join(LANES)}.")
        lanes = []
        for name in wanted:
            if name not in LANES or wanted.count(name) > 1:
                raise UserError(f"Lanes must be different names out of {', '.join(LANES)}, but there is {name!r}.")
            parts = ("sasa", "revision", "sapt") if name == "all" else () if name == "none" else (name,)
            for part in parts:
                if getattr(self.settings, part) is None:
                    raise UserError(f"Lane {name!r} needs {part} artifacts and this model has none. "
                                    "Calibrate it first: python -m safety calibrate.")
            lanes.append(Lane(name, **{part: getattr(self.settings, part) for part in parts}))
        return lanes

    def check(self, lane: Lane, blocks: int) -> None:
        """Raise UserError unless the lane's settings are in range and the artifacts can serve them."""
        for part in ("sasa", "revision", "sapt"):
            if getattr(lane, part) is not None and getattr(self, part) is None:
                raise UserError(f"Lane {lane.name!r} uses {part}, for which this model has no artifacts. "
                                "Calibrate it first: python -m safety calibrate.")
        if lane.sasa is not None and self.sasa is not None:
            lane.sasa.check(blocks)
            pair = (lane.sasa.safety_layer, lane.sasa.fused_layer)
            if lane.sasa.mode == "gate" and pair not in self.sasa.probes:
                raise UserError(f"SASA has no probe for the layers {pair[0]} and {pair[1]}. Choose one of "
                                f"{', '.join(f'{s} and {f}' for s, f in self.sasa.pairs)}, or the mode \"project\".")
        if lane.revision is not None:
            lane.revision.check(blocks)
        if lane.sapt is not None and self.sapt is not None:
            lane.sapt.check()
            if lane.sapt.detector not in self.sapt.detectors:
                raise UserError(f"SAPT has no {lane.sapt.detector!r} detector here; it has "
                                f"{', '.join(sorted(self.sapt.detectors))}.")


def fingerprint(lvlm: LVLM) -> dict[str, Any]:
    """What an artifact must match: the model's name, weights revision, shape, vocabulary and chat template."""
    vocabulary = json.dumps(sorted(lvlm.tokenizer.get_vocab().items())).encode()
    template = str(getattr(lvlm.processor, "chat_template", None) or lvlm.tokenizer.chat_template).encode()
    return {"model": lvlm.name, "revision": lvlm.revision, "blocks": lvlm.blocks, "width": lvlm.width,
            "heads": lvlm.heads, "head_dim": lvlm.head_dim,
            "vocabulary_sha256": hashlib.sha256(vocabulary).hexdigest()[:16],
            "chat_template_sha256": hashlib.sha256(template).hexdigest()[:16]}


def save_artifacts(artifacts: Artifacts, lvlm: LVLM, folder: Path) -> None:
    """Write the folder; parts that are None leave no file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, tensors in _to_tensors(artifacts).items():
        path = folder / f"{part}.safetensors"
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        files[path.name] = _sha256(path)
    settings = {name: value for name, value in asdict(artifacts.settings).items() if value is not None}
    config = {"format": FORMAT, "fingerprint": fingerprint(lvlm), "files": files, "settings": settings,
              "trace_threshold": artifacts.trace.threshold if artifacts.trace else None, "about": artifacts.about}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_artifacts(lvlm: LVLM, folder: Path | str | None = None) -> Artifacts:
    """Load what was calibrated for this model.

    Args:
        folder: where to look; None means the artifacts shipped for this model, and, for a model without any, none.

    Raises:
        UserError: the folder is missing, damaged, tampered with, or belongs to another model; says exactly how.
    """
    if folder is None:
        if lvlm.name != MINIATURE:
            return Artifacts()
        folder = SHIPPED / MINIATURE / "defenses"
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != FORMAT:
            raise UserError(f"The artifacts in {folder} have format {config['format']}, this version reads {FORMAT}. "
                            "Calibrate again.")
        files, expected = dict(config["files"]), dict(config["fingerprint"])
        _compare(folder, expected, fingerprint(lvlm))
        parts = {name.removesuffix(".safetensors"): _read(folder / name, digest) for name, digest in files.items()}
        artifacts = _from_tensors(parts, config, lvlm)
    except FileNotFoundError as error:
        raise UserError(f"The artifact file {error.filename} is missing. Restore it or calibrate again.") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise UserError(f"The artifacts in {folder} are damaged ({type(error).__name__}: {error}). "
                        "Restore them or calibrate again.") from error
    for name in ("sasa", "revision", "sapt"):
        if (getattr(artifacts, name) is None) != (getattr(artifacts.settings, name) is None):
            raise UserError(f"The artifacts in {folder} have {name} tensors without settings or the reverse. "
                            "Calibrate again.")
    for lane in ([artifacts.standard_lanes(name)[0] for name in ("sasa", "revision", "sapt")
                  if getattr(artifacts, name) is not None]):
        artifacts.check(lane, lvlm.blocks)
    return artifacts


def _compare(folder: Path, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    wrong = [f"{key} is {expected.get(key)!r} there and {value!r} here"
             for key, value in actual.items() if expected.get(key) != value]
    if wrong:
        raise UserError(f"The artifacts in {folder} were calibrated for another model: {'; '.join(wrong)}. "
                        "Load that model, or calibrate for this one.")


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    if "/" in path.name or _sha256(path) != digest:
        raise UserError(f"The artifact file {path} does not match its checksum: it was changed or damaged. "
                        "Restore it or calibrate again.")
    tensors = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"The artifact file {path} holds values that are not finite in {name!r}. Calibrate again.")
    return tensors


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_tensors(artifacts: Artifacts) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    if artifacts.sasa:
        named = {f"{s}-{f}": probe for (s, f), probe in artifacts.sasa.probes.items()} | {"clean": artifacts.sasa.clean}
        parts["sasa"] = _probes_to_tensors(named)
    if artifacts.revision:
        parts["revision"] = {"accuracy": artifacts.revision.accuracy,
                             **{f"vector.{k}": v for k, v in artifacts.revision.vectors.items()},
                             **{f"scale.{k}": v for k, v in artifacts.revision.scales.items()}}
    if artifacts.sapt:
        parts["sapt"] = {"soft": artifacts.sapt.soft, **_probes_to_tensors(artifacts.sapt.detectors)}
    if artifacts.trace:
        parts["trace"] = _probes_to_tensors({"trace": artifacts.trace.probe})
    return parts


def _probes_to_tensors(probes: Mapping[str, Probe]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": tensor for name, probe in probes.items()
            for kind, tensor in (("weight", probe.weight), ("bias", probe.bias))}


def _probe(tensors: Mapping[str, Tensor], name: str, features: int, device: torch.device) -> Probe:
    weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
    _shape(name, weight, (features,))
    return Probe(weight, bias.reshape(())).to(device)


def _shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"The artifact tensor {name!r} has shape {tuple(tensor.shape)}, but this model needs {shape}. "
                        "Calibrate for this model.")


def _from_tensors(parts: dict[str, dict[str, Tensor]], config: dict[str, Any], lvlm: LVLM) -> Artifacts:
    device, vocabulary = lvlm.device, lvlm.vocabulary
    result = Artifacts(about=config.get("about", {}))
    if "sasa" in parts:
        names = [name.removesuffix(".weight") for name in parts["sasa"] if name.endswith(".weight")]
        probes = {name: _probe(parts["sasa"], name, vocabulary, device) for name in names}
        clean = probes.pop("clean")
        pairs = {(int(name.split("-")[0]), int(name.split("-")[1])): probe for name, probe in probes.items()}
        result.sasa = SasaArtifact(pairs, clean)
        result.settings.sasa = Sasa(**config["settings"]["sasa"])
    if "revision" in parts:
        tensors = parts["revision"]
        vectors = {k.removeprefix("vector."): v.float() for k, v in tensors.items() if k.startswith("vector.")}
        scales = {k.removeprefix("scale."): v.float() for k, v in tensors.items() if k.startswith("scale.")}
        shapes = {"layer": (lvlm.blocks, lvlm.width), "head": (lvlm.blocks, lvlm.heads, lvlm.head_dim)}
        for level, shape in shapes.items():
            for kind in ("mms", "pwd"):
                _shape(f"vector.{level}_{kind}", vectors[f"{level}_{kind}"], shape)
                _shape(f"scale.{level}_{kind}", scales[f"{level}_{kind}"], shape[:-1])
        _shape("accuracy", tensors["accuracy"], (lvlm.blocks, lvlm.heads))
        result.revision = RevisionArtifact(vectors, scales, tensors["accuracy"].float())
        result.settings.revision = Revision(**config["settings"]["revision"])
    if "sapt" in parts:
        soft = parts["sapt"]["soft"].float()
        _shape("soft", soft, (soft.shape[0], lvlm.width))
        detectors = {name: _probe(parts["sapt"], name, lvlm.width, device) for name in ("joint", "frozen")
                     if f"{name}.weight" in parts["sapt"]}
        result.sapt = SaptArtifact(soft.to(device), detectors)
        result.settings.sapt = Sapt(**config["settings"]["sapt"])
    if "trace" in parts:
        probe = _probe(parts["trace"], "trace", lvlm.width, device)
        result.trace = TraceArtifact(probe, float(config["trace_threshold"]))
    return result
