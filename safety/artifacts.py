"""What calibration produces for one model: one safetensors file per defense and a config.json. Never pickle.

config.json holds the model's fingerprint, the sha256 of every tensor file, the recommended settings of each defense,
and how it was all made (sample recipe, metrics, date, library versions). Loading checks all of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from safety.errors import UserError
from safety.lvlm import LVLM, MINIATURE
from safety.parts import LayersArtifact, RevisionArtifact, SaptArtifact, SasaArtifact, TraceArtifact
from safety.settings import Lane, Revision, Sapt, Sasa

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent.parent / "artifacts"
CONFIG = "config.json"
DEFENSES = ("sasa", "revision", "sapt")
PARTS = (*DEFENSES, "trace", "layers")
LANES = ("none", "sasa", "revision", "sapt", "all")


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
    layers: LayersArtifact | None = None
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
            parts = DEFENSES if name == "all" else () if name == "none" else (name,)
            for part in parts:
                if getattr(self.settings, part) is None:
                    raise UserError(f"Lane {name!r} needs {part} artifacts and this model has none. "
                                    "Calibrate it first: python -m safety calibrate.")
            lanes.append(Lane(name, **{part: getattr(self.settings, part) for part in parts}))
        return lanes

    def check(self, lane: Lane, blocks: int) -> None:
        """Raise UserError unless the lane's settings are in range and the artifacts can serve them."""
        for part in DEFENSES:
            if getattr(lane, part) is not None and getattr(self, part) is None:
                raise UserError(f"Lane {lane.name!r} uses {part}, for which this model has no artifacts. "
                                "Calibrate it first: python -m safety calibrate.")
        lane.check(blocks)
        if lane.sasa is not None and self.sasa is not None:
            pair = (lane.sasa.safety_layer, lane.sasa.fused_layer)
            if lane.sasa.mode == "gate" and pair not in self.sasa.probes:
                raise UserError(f"SASA has no probe for the layers {pair[0]} and {pair[1]}. Choose one of "
                                f"{', '.join(f'{s} and {f}' for s, f in self.sasa.pairs)}, or the mode \"project\".")
            if lane.sasa.mode == "reading" and self.sasa.reading is None:
                raise UserError('SASA has no probe for the mode "reading" here. Calibrate again on samples with '
                                'pictures, or choose the mode "gate" or "probe".')
        if lane.sapt is not None and self.sapt is not None and lane.sapt.detector not in self.sapt.detectors:
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
    """Write the folder, its config.json last; parts that are None leave no file, other files are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        if getattr(artifacts, part) is None:
            path.unlink(missing_ok=True)
            continue
        tensors = getattr(artifacts, part).tensors()
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        files[path.name] = _sha256(path)
    settings = {name: value for name, value in asdict(artifacts.settings).items() if value is not None}
    config = {"format": FORMAT, "fingerprint": fingerprint(lvlm), "files": files, "settings": settings,
              "trace_threshold": artifacts.trace.threshold if artifacts.trace else None,
              "number_format": lvlm.number_format, "about": artifacts.about}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_artifacts(lvlm: LVLM, folder: Path | str | None = None) -> Artifacts:
    """Load what was calibrated for this model.

    Args:
        folder: where to look; None means where calibration puts this model's artifacts, if there are any.

    Raises:
        UserError: the folder is missing, damaged, tampered with, or belongs to another model; says exactly how.
    """
    if folder is None:
        folder = default_folder(lvlm)
        if lvlm.name != MINIATURE and not (folder / CONFIG).is_file():
            return Artifacts()
    folder = Path(folder)
    config = read_config(folder)
    _compare(folder, config["fingerprint"], fingerprint(lvlm))
    return _read(folder, config, lvlm)


@dataclass(frozen=True)
class Found:
    """A folder of artifacts, and why it does not fit the model; reason "" means that it fits."""

    folder: Path
    reason: str


def artifact_folders(lvlm: LVLM, root: Path | None = None) -> list[Found]:
    """Folders of artifacts at `root` or up to three levels below it (None: the ones that come with the project).

    Those that fit the model come first; each is fully checked, as `load_artifacts` does.
    """
    root = root or SHIPPED
    found = []
    for depth in range(4):
        for path in sorted(root.glob("*/" * depth + CONFIG)):
            try:
                if "fingerprint" not in json.loads(path.read_text()):
                    continue  # some other config.json, such as a model's
                load_artifacts(lvlm, path.parent)
                found.append(Found(path.parent, ""))
            except UserError as error:
                found.append(Found(path.parent, str(error)))
            except (OSError, ValueError, TypeError, RecursionError):
                continue
    return sorted(found, key=lambda item: item.reason != "")


def transfer_revision(source: Path, lvlm: LVLM, into: Artifacts) -> Artifacts:
    """The artifacts `into` of a model, with the revision vectors and settings of another model's artifacts.

    Vectors mean something only in the space that they were fitted in, so this is an experiment, and `about` says where
    they came from; the model should be a relative of the other one (another tuning of the same language model).

    Raises:
        UserError: the source is damaged, has no revision vectors, or the models' shapes differ; says which.
    """
    config = read_config(source)
    there, here = config["fingerprint"], fingerprint(lvlm)
    wrong = [f"{key} is {there.get(key)!r} there and {here[key]!r} here"
             for key in ("blocks", "width", "heads", "head_dim") if there.get(key) != here[key]]
    if wrong:
        raise UserError(f"The revision vectors in {source} do not fit {lvlm.name}: {'; '.join(wrong)}. Vectors can be "
                        "transferred between models of one shape only: calibrate revision for this one.")
    name = "revision.safetensors"
    if name not in config["files"] or "revision" not in config["settings"]:
        raise UserError(f"The artifacts in {source} have no revision vectors to transfer.")
    # Read as the whole would be, but for the fingerprint, which is that of another model on purpose.
    config |= {"files": {name: config["files"][name]}, "settings": {"revision": config["settings"]["revision"]},
               "trace_threshold": None, "fingerprint": here}
    other = _read(source, config, lvlm)
    about = {key: value for key, value in into.about.items() if key != "held_out"}  # measured on the old vectors
    about["revision"] = {"transferred_from": there, **dict(other.about.get("revision") or {})}
    return replace(into, revision=other.revision, settings=replace(into.settings, revision=other.settings.revision),
                   about=about)


def default_folder(lvlm: LVLM) -> Path:
    """Where calibration puts a model's artifacts, and where they are looked for."""
    return SHIPPED / lvlm.name.rstrip("/").rpartition("/")[2] / "defenses"


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder of artifacts.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config["format"] != FORMAT:
            raise UserError(f"The artifacts in {folder} have format {config['format']}, this version reads {FORMAT}. "
                            "Calibrate again.")
        return config | {name: dict(config[name]) for name in ("fingerprint", "files", "settings", "about")}
    except OSError as error:
        raise UserError(f"The artifact file {folder / CONFIG} is missing. Restore it or calibrate again.") from error
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"The artifacts in {folder} are damaged ({type(error).__name__}: {error}). "
                        "Restore them or calibrate again.") from error


def read_tensors(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    """The tensors of one artifact file.

    Raises:
        UserError: the name is none of ours, the file does not have this sha256, is no safetensors file, or holds values
            that are not finite.
        FileNotFoundError: there is no such file.
    """
    path = folder / name
    if name not in {f"{part}.safetensors" for part in PARTS} or _sha256(path) != digest:
        raise UserError(f"The artifact file {path} does not match its checksum: it was changed or damaged. "
                        "Restore it or calibrate again.")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"The artifact file {path} is damaged: it is not a safetensors file ({error}). Restore it or "
                        "calibrate again.") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"The artifact file {path} holds values that are not finite in {name!r}. Calibrate again.")
    return tensors


def _compare(folder: Path, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    keys = [key for key, value in actual.items() if expected.get(key) != value]
    if keys:
        wrong = "; ".join(f"{key} is {expected.get(key)!r} there and {actual[key]!r} here" for key in keys)
        commit = str(expected.get("revision"))  # of a Hub model; other models' weights have shorter digests
        advice = f"Load that one with --revision {commit}" if keys == ["revision"] and len(commit) == 40 \
            else "Load that model"
        raise UserError(f"The artifacts in {folder} were calibrated for another model: {wrong}. {advice}, or calibrate "
                        "for this one.")


def _read(folder: Path, config: dict[str, Any], lvlm: LVLM) -> Artifacts:
    """The artifacts that a config lists, checked against the model and their settings."""
    try:
        tensors = {name.removesuffix(".safetensors"): read_tensors(folder, name, digest)
                   for name, digest in config["files"].items()}
        artifacts = _assemble(tensors, config, lvlm)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"The artifact file {error.filename} is missing. Restore it or calibrate again.") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"The artifacts in {folder} are damaged ({type(error).__name__}: {error}). "
                        "Restore them or calibrate again.") from error
    given = {*config["settings"], *(["trace"] if config.get("trace_threshold") is not None else [])}
    for name in (*DEFENSES, "trace"):
        if (getattr(artifacts, name) is None) != (name not in given):
            raise UserError(f"The artifacts in {folder} have {name} tensors without settings or the reverse. "
                            "Restore them or calibrate again.")
    for lane in [artifacts.standard_lanes(name)[0] for name in DEFENSES if getattr(artifacts, name) is not None]:
        artifacts.check(lane, lvlm.blocks)
    return artifacts


def _assemble(tensors: dict[str, dict[str, Tensor]], config: dict[str, Any], lvlm: LVLM) -> Artifacts:
    result = Artifacts(about=config["about"])
    settings = config["settings"]
    if "sasa" in tensors:
        result.sasa = SasaArtifact.read(tensors["sasa"], lvlm)
        result.settings.sasa = Sasa(**settings["sasa"])
    if "revision" in tensors:
        result.revision = RevisionArtifact.read(tensors["revision"], lvlm)
        result.settings.revision = Revision(**settings["revision"])
    if "sapt" in tensors:
        result.sapt = SaptArtifact.read(tensors["sapt"], lvlm)
        result.settings.sapt = Sapt(**settings["sapt"])
    if "trace" in tensors:
        result.trace = TraceArtifact.read(tensors["trace"], lvlm, float(config["trace_threshold"]))
    if "layers" in tensors:
        result.layers = LayersArtifact.read(tensors["layers"], lvlm)
    return result


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
