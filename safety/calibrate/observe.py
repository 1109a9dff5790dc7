"""Look at every sample once, and keep what all the fits need in one small file per sample.

Each sample is looked at once. From one look come the block outputs at its last position, the undefended
answer (greedy, several samples as one batch), the states behind which the answer's tokens were chosen, the activations
of a refusal in the answer's place, and, as far as the disk budget allows, the keys and values that SAPT trains on.
Files are written whole or not at all, and named after everything they depend on: the model's weights and number format,
the sample's content, the recipe. So a later start takes up exactly those that still hold, after a kill at any point.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from safety.artifacts import fingerprint
from safety.calibrate.caches import pack
from safety.calibrate.progress import Progress
from safety.decoding import typed_states
from safety.defenses.sasa import projected_hidden
from safety.errors import UserError
from safety.inputs import open_image
from safety.lvlm import LVLM, Trunk, hooks
from safety.mini.corpus import REFUSALS
from safety.reading import type_out, undefended
from safety.samples import Sample

VERSION = 4  # of the files' content: raise it when what is observed changes
BATCH = 16  # samples that are answered together
READ_TOKENS = 12  # of an answer, whose activations are averaged: about as long as a refusal
CACHE_BYTES = 12 * 2**30  # disk for keys and values; what does not fit is computed again when it is needed


@dataclass(frozen=True)
class Observed:
    """One sample's file. Attributes: the undefended answer (or the sample's own response) as text and tokens; the
    number of prompt positions; rotary position of a token minus its index."""

    path: Path
    answer: str
    ids: list[int]
    length: int
    offset: int

    def tensor(self, name: str) -> Tensor:
        """A stored tensor.

        "prompt.layers" [blocks, width] and "prompt.heads" [blocks, heads, head_dim]: at the last prompt position;
        "answer.…" and "refusal.…": the same, mean of the first tokens; "clean" and "s-f" [width]: post-norm, at the
        last prompt position, of the clean and the projected streams; "typed" [3 * width]: "clean" as text, without the
        picture, of the words that the model reads in it, of the prompt, and of the words above it (where there is no
        picture, "clean" three times); "states" [m, width]: post-norm, those from which the m answer tokens were chosen;
        "cache" [2 * blocks, kv_heads, length + m, head_dim]. Of unanswered ones nothing of an answer is stored, and of
        those for mode "reading" alone only "clean" and "typed".
        """
        with safetensors.safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def row(self, name: str, block: int) -> Tensor:
        """One block of a stored tensor, without reading the others."""
        with safetensors.safe_open(self.path, "pt") as file:
            return file.get_slice(name)[block]

    def has(self, name: str) -> bool:
        """Is this tensor stored?"""
        with safetensors.safe_open(self.path, "pt") as file:
            return name in file.keys()  # noqa: SIM118 (not a dictionary)


def refusal_for(sample: Sample, index: int) -> str:
    """The safe answer that sample number `index` is contrasted with: its own, or plain wordings that take turns."""
    return sample.refusal or REFUSALS[index % len(REFUSALS)]


def digest(*things: object) -> str:
    """16 hexadecimal digits that change with any of the JSON-like values."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_key(lvlm: LVLM) -> str:
    """Changes with the weights, also with those of a folder, whose revision says nothing: 64 numbers of each tensor."""
    sums = hashlib.sha256()
    for name, tensor in sorted(lvlm.model.state_dict().items()):
        flat = (tensor.to_dense() if tensor.is_mkldnn else tensor).detach().reshape(-1)
        sums.update(name.encode() + str(tuple(tensor.shape)).encode())
        sums.update(flat[::max(1, len(flat) // 64)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest(fingerprint(lvlm), lvlm.label, sums.hexdigest())


def sample_key(sample: Sample, *recipe: object) -> str:
    """Changes with anything that a sample's observation depends on, its picture included."""
    picture = hashlib.sha256(Path(sample.image).read_bytes()).hexdigest() if sample.image else ""
    return digest(VERSION, sample.prompt, sample.response, sample.reading_only, picture, recipe)


def observe(lvlm: LVLM, samples: Sequence[Sample], refusals: Sequence[str | None], pairs: Sequence[tuple[int, int]],
            folder: Path, tokens: int, progress: Progress, unanswered: bool = True) -> list[Observed]:
    """Observe the samples that have no file yet; returns all of them in order.

    Args:
        refusals: what a safe answer to each sample would be, for those from which contrasting pairs are made.
        pairs: safety and fused blocks of the projected streams that are run along.
        tokens: length of the undefended answers.
        unanswered: those with an empty response too, which only probes of prompts learn from. Without, they have no
            file, nothing is run for them, and no tensor of theirs can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{sample_key(sample, refusal, pairs, tokens)}.safetensors"
             for sample, refusal in zip(samples, refusals, strict=True)]
    wanted = [unanswered or sample.response != "" for sample in samples]
    left = {number for number, path in enumerate(paths) if wanted[number] and not path.exists()}
    spent = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    batches = [range(start, min(start + BATCH, len(samples))) for start in range(0, len(samples), BATCH)]
    # Processes that share the work folder meet the batches in orders of their own, and leave out what is there by then.
    random.Random(os.getpid()).shuffle(batches)
    with progress.stage("observing samples", sum(wanted), sum(wanted) - len(left)) as tick:
        for batch in batches:
            part = [number for number in batch if wanted[number] and not paths[number].exists()]
            with lvlm.lock, lvlm.encoding_once():
                seen = list(_observe_batch(lvlm, part, samples, refusals, pairs, tokens)) if part else []
            for number, tensors, meta in seen:
                size = tensors["cache"].nbytes if "cache" in tensors else 0
                if spent + size > CACHE_BYTES:
                    tensors.pop("cache", None)
                spent += size
                save_whole(tensors, paths[number], meta)
            for _ in left & set(batch):
                tick()
    return [_read(path) if needed else Observed(path, "", [], 0, 0)
            for path, needed in zip(paths, wanted, strict=True)]


@torch.inference_mode()
def _observe_batch(lvlm: LVLM, numbers: Sequence[int], samples: Sequence[Sample], refusals: Sequence[str | None],
                   pairs: Sequence[tuple[int, int]], tokens: int
                   ) -> Iterator[tuple[int, dict[str, Tensor], dict[str, str]]]:
    trunks: list[Trunk] = []
    kept: list[dict[str, Tensor]] = []
    prompts, pictures, inputs = [], [], []
    for sample in (samples[number] for number in numbers):
        try:
            pictures.append(open_image(sample.image) if sample.image else None)
            inputs.append(lvlm.prepare(sample.prompt, pictures[-1], tokens))
        except UserError as error:
            raise UserError(f"Sample {sample.id}: {error}") from error
        prompts.append(sample.prompt)
    for place, typed in enumerate(type_out(lvlm, prompts, pictures)):
        with _tapped(lvlm, lambda states: states[:, -1]) as tapped:
            trunk = lvlm.prefill(inputs[place], {block for pair in pairs for block in pair})
        kept.append({"clean": trunk.hidden.float().cpu(), "typed": typed_states(lvlm, trunk, typed).float().cpu()})
        if not samples[numbers[place]].reading_only:
            kept[-1] |= {f"prompt.{name}": value for name, value in tapped().items()}
            kept[-1] |= {f"{s}-{f}": projected_hidden(lvlm, trunk, s, f, 1.0).float().cpu() for s, f in pairs}
        trunk.states, trunk.block_kwargs, trunk.decoder_kwargs = {}, {}, {}
        trunks.append(trunk)
    open_ended = [place for place, number in enumerate(numbers) if samples[number].response is None]
    answers = dict(zip(open_ended, undefended(lvlm, [inputs[place] for place in open_ended], tokens), strict=True))
    for place, (number, trunk) in enumerate(zip(numbers, trunks, strict=True)):
        response = samples[number].response
        ids = answers[place] if response is None else lvlm.tokenizer(response, add_special_tokens=False)["input_ids"]
        tensors = kept[place]
        meta = {"answer": response if response is not None else lvlm.text(ids), "ids": json.dumps(ids),
                "length": str(trunk.length), "offset": str(trunk.offset)}
        if response == "":
            yield number, tensors, meta
            continue
        refusal = refusals[number]
        if refusal:
            said = lvlm.tokenizer(refusal, add_special_tokens=False)["input_ids"]
            tensors |= {f"refusal.{name}": value for name, value in reading(lvlm, trunk, said).items()
                        if name != "states"}
            trunk.cache.crop(-len(said))
        read = reading(lvlm, trunk, ids or sorted(lvlm.eos_ids)[:1])  # an empty answer is read as its end
        if not ids:
            trunk.cache.crop(-1)
        tensors |= {"answer.layers": read["layers"], "answer.heads": read["heads"], "states": read["states"]}
        tensors["cache"] = pack(trunk.cache, _small(lvlm)).cpu()
        yield number, tensors, meta


@torch.inference_mode()
def reading(lvlm: LVLM, trunk: Trunk, ids: Sequence[int]) -> dict[str, Tensor]:
    """fp32 on the CPU: "layers" [blocks, width] and "heads" [blocks, heads, head_dim], means over the first READ_TOKENS
    of the given answer tokens, and "states" [m, width] from which each token would be chosen. Extends the trunk's cache
    by the tokens."""
    known = trunk.cache.get_seq_length()
    positions = torch.arange(known, known + len(ids), device=lvlm.device)[None] + trunk.offset
    with _tapped(lvlm, lambda states: states[:, :READ_TOKENS].mean(1)) as tapped:
        states = lvlm.decode(lvlm.embed(torch.tensor([list(ids)], device=lvlm.device)),
                             torch.ones(1, known + len(ids), dtype=torch.long, device=lvlm.device), positions,
                             trunk.cache)[0]
    return {**tapped(), "states": torch.cat([trunk.hidden[None], states[:-1]]).float().cpu()}


@contextmanager
def _tapped(lvlm: LVLM, summary: Callable[[Tensor], Tensor]) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Tap one forward pass at batch 1 inside. What is yielded returns, after it, "layers" [blocks, width] and "heads"
    [blocks, heads, head_dim]: `summary` ([1, positions, features] -> [1, features]) of every block's output and of the
    input of its attention's output projection."""
    layers: dict[int, Tensor] = {}
    heads: dict[int, Tensor] = {}

    def keep(kept: dict[int, Tensor], block: int, states: Tensor) -> None:
        kept[block] = summary(states.float())[0].cpu()

    with hooks() as add:
        for block in range(lvlm.blocks):
            add(lvlm.layers[block].register_forward_hook(
                lambda module, args, output, block=block: keep(layers, block, output)))
            add(lvlm.attention_output(block).register_forward_pre_hook(
                lambda module, args, block=block: keep(heads, block, args[0])))
        yield lambda: {"layers": torch.stack([layers[block] for block in range(lvlm.blocks)]),
                       "heads": torch.stack([heads[block] for block in range(lvlm.blocks)]
                                            ).unflatten(1, (lvlm.heads, lvlm.head_dim))}


def _small(lvlm: LVLM) -> torch.dtype:
    """Keys and values are kept in the model's own 16-bit format, fp32 ones in fp16."""
    dtype = lvlm.embed.weight.dtype
    return torch.float16 if dtype == torch.float32 else dtype


def save_whole(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """Write a safetensors file all or nothing: a killed run leaves no half file under the final name."""
    draft = path.with_suffix(f".{os.getpid()}.part")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, meta)
    draft.replace(path)


def _read(path: Path) -> Observed:
    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
    return Observed(path, meta["answer"], json.loads(meta["ids"]), int(meta["length"]), int(meta["offset"]))
