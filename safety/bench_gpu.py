"""python -m safety bench --gpu: LLaVA-1.5-7B's exact architecture with random weights, made on the device.

Speed and memory do not depend on what the weights say, so no checkpoint is needed. In one run, for each number format:
memory, tokens per second and time to the first token of transformers' own generate(), of one undefended lane, of four
lanes, and of each defense. The rows but generate() take turns token by token, so that what else the machine does falls
on all alike: on a GPU a step of one lane is bound by what the CPU does between kernels, and easily disturbed. A row's
figures are those of its fastest answer; ratios to the undefended lane are medians over the repeats, each a pair.
"""

import copy
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from safety.artifacts import Artifacts, RevisionArtifact, SaptArtifact, SasaArtifact, TraceArtifact
from safety.detector import Probe
from safety.engine import Engine
from safety.errors import UserError
from safety.int4 import Int4Linear
from safety.lvlm import LVLM
from safety.memory import GB, quantised_linears
from safety.settings import Lane, Revision, Sapt, Sasa

FORMATS = ("bf16", "nf4", "int4")  # int4: PyTorch's kernel for many rows, beside bitsandbytes' for one
FULL = {"text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096,
                        "rms_norm_eps": 1e-5}}  # everything else of LLaVA-1.5-7B is LlavaConfig's default
TINY = {"text_config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
                        "num_attention_heads": 4, "vocab_size": 1064, "max_position_embeddings": 4096},
        "image_token_index": 1000,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112, "patch_size": 14}}
WARM_UP = 20  # tokens: a check of SAPT among them
TARGETS = {  # name: (format, highest value, what)
    "four_lanes_vs_one": ("bf16", 1.25, "four lanes / one undefended lane"),
    "four_lanes_vs_separate": ("nf4", 0.6, "four lanes in one stream / four separate runs"),
    "all_vs_undefended": ("bf16", 1.03, "one lane with all defenses / one undefended lane"),
    "four_lanes_peak_gib": ("nf4", 8.0, "GiB at the peak of four lanes"),
}


def run(repeats: int, out: Path, tiny: bool = False, formats: Sequence[str] = FORMATS, tokens: int = 128,
        prompt: int = 1000) -> int:
    """Measure and write the results; prints one line for each row.

    Args:
        out: JSON file that is written. tiny: a small model of the same kind, to see that this works at all.
        formats: out of FORMATS. tokens: new tokens of each answer. prompt: tokens of each prompt, the image's included.

    Raises:
        UserError: there is no GPU for the full size.
    """
    if not 1 <= repeats <= 100:
        raise UserError("--repeats must be between 1 and 100.")
    if not tiny and not torch.cuda.is_available():
        raise UserError("The full-size benchmark needs a CUDA GPU with 24 GB; --tiny tries it out without one.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "model": "tiny LLaVA" if tiny else "LLaVA-1.5-7B, random weights", "date": time.strftime("%Y-%m-%d"),
        "command": "python -m safety bench --gpu" + (" --tiny" if tiny else "") + f" --repeats {repeats}",
        "new_tokens": tokens, "prompt_tokens": prompt, "repeats": repeats, "versions": {"torch": torch.__version__, **{
            package: importlib.metadata.version(package) for package in ("transformers", "bitsandbytes")
            if importlib.util.find_spec(package)}},
    }
    results: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in formats:
        if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            results[name] = {"not_measured": "bitsandbytes is not installed"}
        else:
            results[name] = _measure(name, device, tokens, prompt, repeats, tiny)
            gc.collect()
            torch.cuda.empty_cache()
        targets = _targets(results)
        report = about | {"formats": results, "targets": targets}
        out.write_text(json.dumps(report, indent=2) + "\n")  # after each format: what is measured is kept
    for kind, found in results.items():
        print(kind, found.get("not_measured", ""))
        for row, figures in found.get("rows", {}).items():
            print(f"  {row:12} {figures['seconds']:8.3f} s  first token {figures['first_token']:.3f} s  "
                  f"{figures['tokens_per_second']:7.1f} tokens/s per lane")
    for name, target in targets.items():
        print(f"{name}: {target['measured']:.2f} (≤ {target['target']}: {'met' if target['met'] else 'MISSED'})")
    print(f"Written to {out}.")
    return 0


def _targets(results: dict[str, Any]) -> dict[str, Any]:
    """What was measured of TARGETS, and whether it was met."""
    return {name: {"what": f"{what}, {kind}", "target": limit, "measured": value, "met": value <= limit}
            for name, (kind, limit, what) in TARGETS.items()
            if (value := results.get(kind, {}).get("ratios", {}).get(name)) is not None}


def _measure(kind: str, device: str, tokens: int, prompt: int, repeats: int, tiny: bool) -> dict[str, Any]:
    lvlm = _build(kind, device, prompt, tiny)
    weights = torch.cuda.memory_allocated() if device == "cuda" else 0
    engine = Engine(lvlm, _artifacts(lvlm))
    s, f = (1, 2) if tiny else (13, 15)  # SASA's blocks for LLaVA-1.5-7B
    sasa, sapt = Sasa(s, f, threshold=1.0), Sapt(threshold=1.0)  # nothing fires: every lane does its full work
    revision = Revision(2 if tiny else 19, level="head")
    lanes = {"undefended": [Lane("none")], "sasa": [Lane("sasa", sasa=sasa)],
             "revision": [Lane("revision", revision=revision)], "sapt": [Lane("sapt", sapt=sapt)],
             "all": [Lane("all", sasa, revision, sapt)]}
    separate = ("undefended", "sasa", "revision", "sapt")
    lanes["four lanes"] = [lane for name in separate for lane in lanes[name]]
    peaks: dict[str, float] = {}  # measured in a first, short round, which also warms up

    def alone(name: str, call: Callable[[], object]) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        call()
        if device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    short = min(WARM_UP, tokens)
    lvlm.length = prompt + tokens - short  # in the end the caches are as long as in a whole answer
    alone("generate()", lambda: _generate(lvlm, short, device))
    for name, chosen in lanes.items():
        alone(name, lambda chosen=chosen: engine.answer("-", lanes=chosen, max_new_tokens=short))  # type: ignore[misc]
    lvlm.length = prompt
    times: dict[str, list[list[float]]] = {name: [] for name in ("generate()", *lanes)}
    for _ in tqdm(range(repeats), desc=kind):
        for name, seconds in _in_turns(lvlm, engine.artifacts, lanes, tokens, device).items():
            times[name].append(seconds)
        times["generate()"].append(_generate(lvlm, tokens, device))
    rows = {}
    for name, measured in times.items():
        best = min(measured, key=sum)
        rows[name] = {"seconds": sum(best), "first_token": best[0], "peak_gib": peaks.get(name),
                      "tokens_per_second": (tokens - 1) / max(sum(best[1:]), 1e-9),
                      "all_seconds": [round(sum(values), 4) for values in measured]}

    def ratio(row: str, *others: str, of: Callable[[list[float]], float] = sum) -> float:
        return statistics.median(of(times[row][repeat]) / sum(of(times[other][repeat]) for other in others)
                                 for repeat in range(repeats))
    ratios = {"four_lanes_vs_one": ratio("four lanes", "undefended"),
              "four_lanes_vs_separate": ratio("four lanes", *separate),
              "undefended_vs_generate": ratio("undefended", "generate()"),
              "first_token_four_vs_one": ratio("four lanes", "undefended", of=lambda seconds: seconds[0]),
              **{f"{name}_vs_undefended": ratio(name, "undefended") for name in (*separate[1:], "all")},
              **({"four_lanes_peak_gib": peaks["four lanes"]} if peaks else {})}
    return {"weights_gb": weights / GB, "rows": rows, "ratios": ratios}


class _RandomLVLM(LVLM):
    """A model without a processor: every request is an image and as many tokens as are wanted."""

    length: int

    def prepare(self, prompt: str, image: object, room: int) -> dict[str, Tensor]:
        """Random pixels, their placeholders, and text up to `length` tokens."""
        vision = self.model.config.vision_config
        count = (vision.image_size // vision.patch_size) ** 2
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(100, 900, (1, max(1, self.length - count)), generator=generator)
        ids = torch.cat([torch.full((1, count), self.model.config.image_token_id), text], 1).to(self.device)
        pixels = torch.rand(1, 3, vision.image_size, vision.image_size, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "pixel_values": pixels.to(self.device, self.embed.weight.dtype)}


def _build(kind: str, device: str, prompt: int, tiny: bool) -> _RandomLVLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava", **(TINY if tiny else FULL))
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if kind != "bf16":
        _quantise(model, kind)
    model.generation_config.eos_token_id = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(
        {f"t{number}": number for number in range(config.text_config.vocab_size)}, unk_token="t0")))
    lvlm = _RandomLVLM("LLaVA-1.5-7B", model, SimpleNamespace(tokenizer=tokenizer, chat_template=""), kind)
    lvlm.eos_ids, lvlm.length = frozenset(), prompt
    return lvlm


def _quantise(model: Any, kind: str) -> None:
    """Replace the linear layers one by one, so that both copies of only one of them exist at a time."""
    for name, linear in quantised_linears(model).items():
        if kind == "int4" and (linear.in_features % 128 or linear.out_features % 16):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int4Linear(linear) if kind == "int4" else _nf4(linear))


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                              compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to(linear.weight.device).eval()  # moving it to its device quantises it


def _artifacts(lvlm: LVLM) -> Artifacts:
    """Random artifacts of the shapes that calibration would produce."""
    generator = torch.Generator().manual_seed(1)

    def probe(features: int) -> Probe:
        return Probe(torch.randn(features, generator=generator) / features, torch.zeros(())).to(lvlm.device)

    shapes = {"layer": (lvlm.blocks, lvlm.width), "head": (lvlm.blocks, lvlm.heads, lvlm.head_dim)}
    vectors = {f"{level}_mms": 0.01 * torch.randn(*shape, generator=generator) for level, shape in shapes.items()}
    scales = {name: torch.ones(value.shape[:-1]) for name, value in vectors.items()}
    return Artifacts(
        sasa=SasaArtifact({pair: probe(lvlm.vocabulary) for pair in ((1, 2), (13, 15))}, probe(lvlm.vocabulary)),
        revision=RevisionArtifact(vectors, scales, torch.rand(lvlm.blocks, lvlm.heads, generator=generator)),
        sapt=SaptArtifact(0.02 * torch.randn(4, lvlm.width, generator=generator).to(lvlm.device),
                          {"joint": probe(lvlm.width)}),
        trace=TraceArtifact(probe(lvlm.width), 0.5))


def _in_turns(lvlm: LVLM, artifacts: Artifacts, lanes: dict[str, list[Lane]], tokens: int,
              device: str) -> dict[str, list[float]]:
    """{row: [seconds of each token]}: the rows take turns, token by token, so that a disturbance falls on all alike.

    The first token's time is that until all lanes of the row have theirs.
    """
    streams = {}
    for name, chosen in lanes.items():
        twin = copy.copy(lvlm)
        twin.lock = threading.Lock()  # one model may run several streams in turn: hooks live for one pass only
        streams[name] = Engine(twin, artifacts).stream("-", lanes=chosen, max_new_tokens=tokens)
    times: dict[str, list[float]] = {name: [] for name in lanes}
    names = list(lanes)
    for token in range(tokens):
        for name in names[token % len(names):] + names[:token % len(names)]:  # nobody always follows the same row
            _wait(device)
            began = time.perf_counter()
            for _ in lanes[name]:
                next(streams[name])
            _wait(device)
            times[name].append(time.perf_counter() - began)
    return times


def _generate(lvlm: LVLM, tokens: int, device: str) -> list[float]:
    """The same for one undefended request through transformers: [first token, each of the others on average]."""
    def seconds(count: int) -> float:
        _wait(device)
        began = time.perf_counter()
        lvlm.model.generate(**lvlm.prepare("-", None, 0), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        _wait(device)
        return time.perf_counter() - began
    first, total = seconds(1), seconds(tokens)
    return [first, *[(total - first) / (tokens - 1)] * (tokens - 1)]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
