"""Load an LVLM: the miniature, a Hugging Face id or a folder, in the number format and place that memory allows."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safety import hub, memory
from safety.errors import UserError
from safety.lvlm import CHECKED, LVLM, MINIATURE, unsupported
from safety.quantize import fast_dtype

QUANTIZATIONS = ("none", "bf16", "int8", "nf4")
EXAMPLE = "llava-hf/llava-1.5-7b-hf"
DIGESTED = 1 << 20  # bytes at either end of a weight file that tell one set of weights from another

Progress = Callable[[str], None]


def load(name: str = MINIATURE, quantization: str | None = None, revision: str | None = None,
         progress: Progress = lambda message: None, replaced: LVLM | None = None) -> LVLM:
    """Load an LVLM by name: the miniature, a Hugging Face hub id or a folder.

    Weights are read from safetensors only, and code that comes with a model is never run.

    Args:
        name: "miniature", "owner/model", "owner/model@revision" or a folder.
        quantization: "none" (fp32), "bf16", "int8", "nf4"; None takes what is fastest here among what fits.
        revision: branch, tag or commit on the Hub.
        progress: called with a sentence at each stage and while downloading.
        replaced: a loaded model that makes room: it is closed, as late as possible, if there is not room for both.

    Raises:
        UserError: unknown quantization or model, nothing to load it from, or not enough memory; says what to do.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(f"Quantization must be one of {', '.join(QUANTIZATIONS)}, but it is {quantization!r}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to be fp32; the default rounds a picture's patches to 10 bits
    local = name == MINIATURE or Path(name).is_dir()
    if local and revision is not None:
        raise UserError(f"{name} is not on the Hugging Face Hub and has no revisions: leave --revision out.")
    if name == MINIATURE:
        return _load_miniature(quantization, device, progress)
    if local:
        folder = Path(name).resolve()
        model, processor, chosen = _load_folder(folder, folder.name, quantization, device, progress, replaced)
        return LVLM(folder.name, model, processor, chosen, _digest(folder), str(folder))
    if name.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {name}.")
    if revision is None and "@" in name:
        name, _, revision = name.rpartition("@")
    progress(f"Looking {name} up …")
    folder = hub.fetch_description(name, revision)
    model, processor, chosen = _load_folder(folder, name, quantization, device, progress, replaced,
                                            lambda: hub.fetch_weights(name, folder, progress))
    return LVLM(name, model, processor, chosen, folder.name, f"{name}@{folder.name}")


def _load_miniature(quantization: str | None, device: str, progress: Progress) -> LVLM:
    from safety.mini.assemble import ARTIFACT, CONFIG, load_miniature
    from safety.quantize import Int8Linear, int8_is_faster, quantize_linears
    if quantization is None:
        quantization = "bf16" if device == "cuda" else "int8" if int8_is_faster() else "none"
    if quantization == "nf4" or (quantization == "int8" and device == "cuda"):
        raise UserError(f"The miniature is too small for {quantization} on {device}. "
                        "Use --quantization none or bf16, or int8 on a CPU.")

    def fetched(done: int, total: int) -> None:
        progress(f"Fetching the miniature's language model (once): {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if done >= total:
            progress("Converting the language model (once, some twenty seconds) …")

    progress("Loading the miniature LVLM …")
    model, processor = load_miniature(torch.bfloat16 if quantization == "bf16" else torch.float32, device,
                                      progress=hub.at_twentieths(fetched))
    if quantization == "int8":
        quantize_linears(model.get_decoder())
        model.lm_head = Int8Linear(model.lm_head)
    files = json.loads((ARTIFACT / CONFIG).read_text())["files"]
    revision = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    return LVLM(MINIATURE, model, processor, quantization, revision, MINIATURE)


def _load_folder(folder: Path, name: str, wanted: str | None, device: str, progress: Progress, replaced: LVLM | None,
                 fetch_weights: Callable[[], None] = lambda: None) -> tuple[Any, Any, str]:
    """(model, processor, number format) from a model folder.

    What can go wrong is tried in order of cost: weights are fetched when everything else is known to be right, and
    the model that is to be replaced is closed after that.
    """
    config = _read_config(folder, name)
    shapes = _shapes(config, name)
    processor = _read_processor(folder, name, config)
    compute = fast_dtype(device)
    stored = _stored_quantization(config, name, wanted)
    preferred = (stored,) if stored else _preferred(device, compute)
    needs, room = memory.need(shapes, device, compute), memory.free_memory(device)
    if replaced:
        room = [free + held for free, held in zip(room, memory.held(replaced.model, device), strict=True)]
    chosen = memory.choose(name, wanted, preferred, needs, device, room)
    if chosen in ("int8", "nf4") and not _has_bitsandbytes():
        raise UserError(f"{chosen} needs bitsandbytes: pip install bitsandbytes. Or use --quantization bf16 or none.")
    if config.model_type not in CHECKED:
        progress(f"The defenses have not been checked on the architecture {config.model_type!r}: trust them less.")
    fetch_weights()
    _check_weight_files(folder, name)
    if replaced and not memory.fits(needs.of(chosen), memory.free_memory(device)):
        progress(f"Making room for {name} …")
        with replaced.lock:
            replaced.close()
        memory.give_back()
    progress(f"Loading {name} in {chosen} (about {needs.of(chosen) / memory.GB:.1f} GB) …")
    arguments = memory.placement(needs.of(chosen), device, memory.free_memory(device))
    arguments["dtype"] = {"none": torch.float32, "bf16": torch.bfloat16}.get(chosen, compute)
    if not stored and chosen in ("int8", "nf4"):
        arguments["quantization_config"] = _quantization_config(chosen, compute, shapes)
    return _read_model(folder, name, arguments), processor, chosen


def _read_processor(folder: Path, name: str, config: Any) -> Any:
    from safety.processors import read_processor
    try:
        processor = read_processor(folder, config)
    except ImportError as error:
        raise UserError(f"The processor of {name} needs a package that is not installed: "
                        f"{_first_line(error)}.") from error
    except Exception as error:  # damaged and foreign files make the readers raise anything
        raise UserError(f"The processor of {name} could not be loaded ({_first_line(error)}). Fetch the model again, "
                        f"or choose another, such as {EXAMPLE}.") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UserError(f"{name} has no processor with a chat template, so it cannot be asked anything. Choose a model "
                        f"that was tuned to chat, such as {EXAMPLE}.")
    return processor


def _read_model(folder: Path, name: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **arguments)
        model, info = loaded
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"The memory ran out while {name} was loaded. Free some, or use a smaller --quantization or "
                        "model.") from error
    except Exception as error:  # as above
        raise UserError(f"{name} could not be loaded ({_first_line(error)}). Fetch it again, or choose another model, "
                        f"such as {EXAMPLE}.") from error
    if info["missing_keys"]:
        raise UserError(f"{name} is incomplete: it has no weights for {sorted(info['missing_keys'])[0]!r}. "
                        "Fetch it again, or choose another model.")
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks 4-bit weights at their first inference, for a kernel
        # that gradients silently do not pass through, and state_dict() puts them back with their scales disordered.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _read_config(folder: Path, name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        try:
            described = json.loads((folder / "config.json").read_text())
            kind = described["model_type"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{name} is not a transformers model: it has no usable config.json. Choose another, such "
                            f"as {EXAMPLE}.") from error
        if kind in CONFIG_MAPPING:
            raise UserError(f"The config.json of {name} is damaged ({_first_line(error)}). Fetch it again.") from error
        own = "it brings code of its own, which is not run" if "auto_map" in described else \
            "this version of transformers does not know it"
        raise UserError(f"{name} has the architecture {kind!r}, and {own}. Look for a version of the model that is "
                        "converted for transformers (its name often ends in -hf).") from error


def _shapes(config: Any, name: str) -> Any:
    """The model without weights, once it is known that it can be an LVLM here."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        what = ("a text-only model" if type(config) in AutoModelForCausalLM._model_mapping
                else "not a vision-language model that answers in text")
        raise UserError(f"{name} is {what} ({config.model_type}). Choose a vision-language model, such as {EXAMPLE}.")
    try:
        with torch.device("meta"):
            shapes = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise UserError(f"The config.json of {name} is damaged ({_first_line(error)}). Fetch it again.") from error
    reason = unsupported(shapes)
    if reason:
        raise UserError(f"{name} has the architecture {config.model_type!r}, which the defenses cannot reach into: "
                        f"{reason}. Choose another model, such as {EXAMPLE}.")
    return shapes


def _stored_quantization(config: Any, name: str, wanted: str | None) -> str:
    """The format of weights that are stored quantised, "" for ordinary weights."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method") != "bitsandbytes":
        raise UserError(f"{name} is stored in {stored.get('quant_method')!r}, which is not supported. Choose the "
                        "unquantised model and use --quantization nf4.")
    kind = "nf4" if stored.get("load_in_4bit") else "int8"
    if wanted not in (None, kind):
        raise UserError(f"{name} is stored in {kind} and cannot be loaded in {wanted}. Choose the unquantised model, "
                        "or leave --quantization out.")
    return kind


def _preferred(device: str, compute: torch.dtype) -> tuple[str, ...]:
    """Number formats, fastest first."""
    plain = "bf16" if compute == torch.bfloat16 else "none"
    if not _has_bitsandbytes():
        return (plain,)
    return (plain, "nf4") if device == "cuda" else (plain, "int8", "nf4")


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _quantization_config(quantization: str, compute: torch.dtype, shapes: Any) -> Any:
    from transformers import BitsAndBytesConfig
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast in every layer of every step
    quantised = memory.quantised_linears(shapes)
    left = [name for name, module in shapes.named_modules() if isinstance(module, nn.Linear) and name not in quantised]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute,
                              llm_int8_skip_modules=left)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _check_weight_files(folder: Path, name: str) -> None:
    missing = [file for file in hub.weight_files(folder) if not (folder / file).is_file()]
    if missing == [hub.SINGLE]:
        raise UserError(f"{name} has no safetensors weights. Pickled weights (.bin, .pt) are not loaded, because they "
                        "can run code: choose a repository or revision with model.safetensors.")
    if missing:
        raise UserError(f"{name} is incomplete: {missing[0]} is missing. Fetch it again.")


def _digest(folder: Path) -> str:
    """Tells one folder's weights from another's: both ends (names and shapes come first) and sizes of the files."""
    digest = hashlib.sha256()
    for file in hub.weight_files(folder):
        size = (folder / file).stat().st_size
        with (folder / file).open("rb") as stream:
            digest.update(f"{file} {size} ".encode() + stream.read(DIGESTED))
            stream.seek(max(0, size - DIGESTED))
            digest.update(stream.read(DIGESTED))
    return digest.hexdigest()[:16]
