"""Train the vision tower: read letters from pictures, learn the dictionary without pictures, then both together."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from safety.errors import UserError
from safety.mini.ahead import Ahead
from safety.mini.corpus import PUBLIC
from safety.mini.handwriting import Handwriting
from safety.mini.lexicon import Lexicon
from safety.mini.scenes import SceneMaker
from safety.mini.vision import Reader, build_tower, letter_table, pick, reading_rates, to_pixels
from safety.quantize import fast_dtype

BATCH = 32
SPOTS = 320  # word patches that a step learns from
SYMBOL_PICTURES = 12  # pictures of a batch that are sure to show symbols
SYMBOL_SPOTS = 96  # word patches of these that a step learns from besides
LEARNING_RATE = 4e-3
WARMUP_STEPS = 60
CHECKPOINT_SECONDS = 150
VALIDATION_IMAGES = 96
HANDWRITING_BATCHES = 80
READING_CHECKPOINT = "reading.pt"

Batch = tuple[Tensor, dict[str, Tensor]]


def csv_texts(data: Path | None) -> list[str]:
    """All cells of the development sets that may train shipped weights; empty without the folder."""
    texts: list[str] = []
    for path in (data / f"{name}.csv" for name in PUBLIC) if data else ():
        with path.open(newline="", encoding="utf-8") as file:
            texts += [cell for row in csv.reader(file) for cell in row]
    return texts


def make_batch(maker: SceneMaker, seed: tuple[int, ...], count: int = BATCH, kind: str | None = None) -> Batch:
    """Pixels [count, 3, 224, 224] and patch labels [count, 196], a pure function of the seed."""
    rng = np.random.default_rng(seed)
    scenes = [maker.scene(rng, kind) for _ in range(count)]
    labels = {
        name: torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes]))
        for name in ("character", "word", "part")
    }
    return to_pixels(np.stack([scene.pixels for scene in scenes])), labels


def mixed_batch(maker: SceneMaker, seed: tuple[int, ...]) -> Batch:
    """A training batch whose last pictures show symbols; every third batch has free text only beside them."""
    first = make_batch(maker, (*seed, 0), BATCH - SYMBOL_PICTURES, None if seed[-1] % 3 else "text")
    second = make_batch(maker, (*seed, 1), SYMBOL_PICTURES, "picture")
    return torch.cat([first[0], second[0]]), {name: torch.cat([first[1][name], second[1][name]]) for name in first[1]}


def symbol_spots(here: Tensor) -> Tensor:
    """Flat indices of word patches among a mixed batch's pictures of symbols; ``here`` [batch, 196] marks all."""
    symbols = here.clone()
    symbols[:-SYMBOL_PICTURES] = False
    return pick(symbols, SYMBOL_SPOTS)


def on(batch: Batch, device: str) -> Batch:
    """The batch on a device."""
    return batch[0].to(device), {name: label.to(device) for name, label in batch[1].items()}


def rate_at(step: int, steps: int, decay: float) -> float:
    """Learning rate factor: short warm-up, flat, linear fall over the last ``decay`` share of the run."""
    fall = (steps - step) / (steps * decay)
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, fall))


def mixed_precision(device: str) -> Callable[[], torch.autocast]:
    """Makes contexts for computing in bfloat16 where that is fast; else they do nothing: a CPU without bf16
    instructions is seventy times slower in it. It measures, so ask once."""
    return partial(torch.autocast, device, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one move, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train_loop(
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    loss_of: Callable[[int], dict[str, Tensor]],
    measure: Callable[[], dict[str, float]],
    *,
    steps: int,
    checkpoint: Path,
    name: str,
    decay: float = 0.4,
    measure_every: int = 100,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    seed: int = 0,
) -> None:
    """Minimise the sum of named losses; resumes from the checkpoint if there is one.

    Args:
        model: saved and restored as a whole.
        optimisers: with their peak learning rates.
        loss_of: weighted losses of a step; must depend on the step number alone for a resumed run to match.
        measure: figures to log now and then.
        steps: length of the run; a resumed run may be given another length.
        checkpoint: file that holds the run's state.
        name: label of the progress bar.
        decay: share of the run over which the learning rate falls to zero at the end.
        measure_every: steps between measurements.
        checkpoint_seconds: time between checkpoints.
        seed: of the data that ``loss_of`` draws, kept with the run's state.

    Raises:
        UserError: the checkpoint is of a run with another seed.
    """
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    peaks = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    start = 0
    device = next(model.parameters()).device.type
    mixed = mixed_precision(device)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state.get("seed", seed) != seed:
            raise UserError(f"{checkpoint} holds a run with seed {state['seed']}, not {seed}. Go on with --seed "
                            f"{state['seed']}, or give another --work folder.")
        model.load_state_dict(state["model"])
        for optimiser, saved_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        start = state["step"]
    saved = time.monotonic()
    with tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5) as bar:
        for step in bar:
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate_at(step, steps, decay)
            torch.manual_seed(step)  # a resumed run draws what an unbroken one would have drawn
            with mixed():
                losses = loss_of(step)
                total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                raise RuntimeError(f"{name} diverged at step {step}; delete {checkpoint} and lower the learning rate.")
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            done = step + 1
            if done % measure_every == 0 or done == steps:
                with torch.no_grad(), mixed():
                    rates = measure()
                shown = {key: round(value.item(), 3) for key, value in losses.items()}
                bar.write(f"{name} step {done} losses {shown} rates { {k: round(v, 3) for k, v in rates.items()} }")
            if done == steps or time.monotonic() - saved >= checkpoint_seconds:
                moments = [optimiser.state_dict() for optimiser in optimisers]
                state = {"model": model.state_dict(), "optimisers": moments, "step": done, "seed": seed}
                save_checkpoint(checkpoint, state)
                saved = time.monotonic()


def train_reading(
    lexicon: Lexicon, folder: Path, *, images: int = 41_600, seed: int = 0, device: str = "cpu"
) -> Reader:
    """Train the reading blocks; ``folder/reading.pt`` holds the run.

    Args:
        lexicon: words to draw.
        folder: where checkpoints go.
        images: training pictures in total.
        seed: of the initial weights and the pictures.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(seed)
    reader = Reader(build_tower()).to(device)
    letters = letter_table(lexicon).to(device)
    maker = SceneMaker(lexicon)
    seen = on(make_batch(maker, (seed, 1), VALIDATION_IMAGES), device)
    unseen = on(make_batch(SceneMaker(lexicon, held_out=True), (seed, 2), VALIDATION_IMAGES), device)

    steps = images // BATCH
    drawn = Ahead(lambda step: mixed_batch(maker, (seed, 0, step)), steps, device)

    def loss_of(step: int) -> dict[str, Tensor]:
        pixels, labels = on(drawn(step), device)
        middle, states, _ = reader.read(pixels)
        here = labels["word"] >= 0
        spots = torch.cat([pick(here, SPOTS), symbol_spots(here)])
        losses = reader.losses(middle, states, labels, letters, spots)
        # Few patches stand for a word: without this, where a symbol's name goes is learned very late.
        kinds = reader.kind_head(states.flatten(0, 1)[spots]).float()
        placed = F.cross_entropy(kinds, labels["part"].flatten()[spots] + 1)
        weights = {"character": 0.5, "kind": 2.0, "letters": 1.25, "code": 0.75}
        return {name: weights[name] * loss for name, loss in losses.items()} | {"placed": 0.3 * placed}

    def measure() -> dict[str, float]:
        rates: dict[str, float] = {}
        for label, (pixels, labels) in (("seen", seen), ("unseen", unseen)):
            middle, states, _ = reader.read(pixels)
            rates |= {f"{label} {k}": v for k, v in reading_rates(reader, middle, states, labels, letters).items()}
        return rates

    train_loop(
        reader,
        reader.optimisers(LEARNING_RATE),
        loss_of,
        measure,
        steps=steps,
        checkpoint=folder / READING_CHECKPOINT,
        name="Reading",
        decay=0.6,
        seed=seed,
    )
    return reader


def load_reader(folder: Path) -> Reader:
    """The trained reader of a build folder."""
    reader = Reader(build_tower())
    reader.load_state_dict(torch.load(folder / READING_CHECKPOINT, map_location="cpu", weights_only=True)["model"])
    return reader.eval()


@torch.no_grad()
def look_at_handwriting(reader: Reader, lexicon: Lexicon, seed: int, batches: int = HANDWRITING_BATCHES) -> Handwriting:
    """What a trained reader, on whatever device, writes at the word patches of fresh training pictures; on the CPU."""
    maker, letters, device = SceneMaker(lexicon), letter_table(lexicon), reader.book.device.type
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    drawn = Ahead(lambda step: make_batch(maker, (seed, 6, step), kind=None if step % 4 else "text"), batches, device)
    mixed = mixed_precision(device)
    for step in range(batches):
        pixels, labels = drawn(step)
        with mixed():
            _, states, _ = reader.read(pixels.to(device))
        here = labels["word"] >= 0
        found.append((states.cpu()[here].float(), labels["word"][here], labels["part"][here]))
    states, words, part = (torch.cat(values) for values in zip(*found, strict=True))
    return Handwriting.of(reader.book.cpu(), states, words, part, letters)
