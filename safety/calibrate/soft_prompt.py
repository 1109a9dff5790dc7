"""Train SAPT's soft prompt and its joint detector (arXiv 2506.15734, section 3.3).

L = L_refuse + alpha L_benign + beta L_detector: behind a harmful prefix of random length (empty for one third) the
soft prompt leads to a refusal, behind a benign one to its own continuation; the detector reads the state of the last
soft token. The model is frozen, and what stands before the soft prompt needs no gradient: it is kept as keys and
values, made once by the model as it is served, while gradients pass through a copy of the same weights in a
differentiable number format. Several lessons share a forward pass.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from safety.calibrate.caches import join
from safety.detector import Probe
from safety.lvlm import LVLM
from safety.parts import SaptArtifact

INSTRUCTION = "Refuse if the partial output is unsafe; otherwise continue helpfully."


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the paper's, except where a comment says otherwise."""

    length: int = 4
    benign_weight: float = 1.0  # alpha
    detector_weight: float = 0.05  # beta, of the released code
    learning_rate: float = 5e-3  # 1e-4 in the paper, for 7B models and more steps
    weight_decay: float = 0.01
    batch: int = 8
    steps: int = 200  # at most
    check_every: int = 25  # ours: steps between looks at held-out pairs …
    patience: int = 3  # … and looks without a better loss after which training stops
    target_tokens: int = 16  # ours: targets are cut, the first words decide
    empty_share: float = 1 / 3
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A request, the undefended answer to it, and, where the answer is harmful, the refusal to learn.

    Attributes:
        answer: token ids. refusal: token ids with the one that ends an answer; None for a benign lesson.
        length: prompt positions. offset: rotary position of a token minus its index.
        cache: returns the keys and values of prompt and answer, packed (`caches.pack`).
        end: the token that ended the answer; nothing where it was cut off.
    """

    answer: list[int]
    refusal: list[int] | None
    length: int
    offset: int
    cache: Callable[[], Tensor]
    end: tuple[int, ...] = ()

    def target(self, cut: int) -> list[int]:
        """What should follow the answer's first `cut` tokens."""
        return self.refusal if self.refusal is not None else [*self.answer, *self.end][cut:]

    def behind(self, cut: int) -> Tensor:
        """Keys and values of the prompt and the answer's first `cut` tokens."""
        return self.cache()[:, :, :self.length + cut]


class SoftPrompt(nn.Module):
    """The trained parameters: soft [length, width], detector weight [width] and bias []."""

    def __init__(self, lvlm: LVLM, length: int) -> None:
        super().__init__()
        ids = lvlm.tokenizer(INSTRUCTION, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        with torch.no_grad():
            words = lvlm.embed(ids.to(lvlm.device)).float()
        # The instruction's embeddings, pooled into as many pieces as there are soft tokens (repeated if it is shorter).
        words = words.repeat(-(-length // len(words)), 1)
        self.soft = nn.Parameter(torch.stack([piece.mean(0) for piece in words.tensor_split(length)]).clone())
        self.weight = nn.Parameter(torch.zeros(lvlm.width, device=lvlm.device))
        self.bias = nn.Parameter(torch.zeros((), device=lvlm.device))

    def artifact(self) -> SaptArtifact:
        """The soft prompt with its joint detector."""
        probe = Probe(self.weight.detach().clone(), self.bias.detach().clone())
        return SaptArtifact(self.soft.detach().clone(), {"joint": probe})


def random_cut(lesson: Lesson, recipe: Recipe, rng: random.Random) -> int:
    """How much of the answer stands before the soft prompt: nothing for one third of the draws. A benign answer is
    never used up: something must follow."""
    most = len(lesson.answer) - (lesson.refusal is None and not lesson.end)
    return 0 if most < 1 or rng.random() < recipe.empty_share else rng.randint(1, most)


def losses(trainable: LVLM, module: SoftPrompt, lessons: Sequence[Lesson], cuts: Sequence[int],
           recipe: Recipe) -> tuple[Tensor, Tensor]:
    """([lessons] mean cross-entropy of each target behind the soft prompt, [lessons] detector losses)."""
    device = trainable.device
    targets = [lesson.target(cut)[:recipe.target_tokens] for lesson, cut in zip(lessons, cuts, strict=True)]
    width = max(map(len, targets))
    ids = torch.tensor([target + [0] * (width - len(target)) for target in targets], device=device)
    real = torch.tensor([[1.0] * len(target) + [0.0] * (width - len(target)) for target in targets], device=device)
    soft = module.soft.expand(len(lessons), -1, -1)
    states = _decode(trainable, torch.cat([soft, trainable.embed(ids[:, :-1]).float()], 1), lessons, cuts)
    behind = states[:, recipe.length - 1:]  # the last soft token, then every target token but the last
    words = cross_entropy(trainable.lm_head(behind).float().transpose(1, 2), ids, reduction="none")
    logits = behind[:, 0].float() @ module.weight + module.bias
    harmful = torch.tensor([float(lesson.refusal is not None) for lesson in lessons], device=device)
    return ((words * real).sum(1) / real.sum(1),
            binary_cross_entropy_with_logits(logits, harmful, reduction="none"))


def _decode(lvlm: LVLM, embeds: Tensor, lessons: Sequence[Lesson], cuts: Sequence[int]) -> Tensor:
    """Post-norm states [lessons, q, width] of embeddings behind each lesson's prefix."""
    dtype = lvlm.embed.weight.dtype
    cache, mask = join([lesson.behind(cut) for lesson, cut in zip(lessons, cuts, strict=True)], lvlm.device, dtype)
    offsets = torch.tensor([[lesson.offset] for lesson in lessons], device=lvlm.device)
    positions = mask.sum(1, keepdim=True) + offsets + torch.arange(embeds.shape[1], device=lvlm.device)
    mask = torch.cat([mask, mask.new_ones(embeds.shape[:2])], 1)
    return lvlm.decode(embeds.to(dtype), mask, positions, cache)


@torch.inference_mode()
def soft_states(lvlm: LVLM, soft: Tensor, lessons: Sequence[Lesson], cuts: Sequence[int]) -> Tensor:
    """[lessons, width] fp32 post-norm states of the last soft token behind each prefix, as a check would see them."""
    return _decode(lvlm, soft.expand(len(lessons), -1, -1), lessons, cuts)[:, -1].float()


def train(lvlm: LVLM, trainable: LVLM, lessons: Sequence[Lesson], held_out: Sequence[Lesson],
          recipe: Recipe = Recipe(), report: Callable[[int, int], None] = lambda step, steps: None,
          state: dict[str, Any] | None = None, save: Callable[[dict[str, Any]], None] = lambda state: None,
          ) -> tuple[SaptArtifact, dict[str, Any]]:
    """Train on the lessons, half harmful and half benign per batch, until held-out pairs stop improving.

    Args:
        lvlm: embeds the instruction that the soft prompt starts from; gradients pass through `trainable`, which may be
            the same model.
        held_out: lessons that decide when to stop; with none, all steps are taken.
        report: called with (step, steps at most) after every optimiser step.
        state: where to resume from; save: called with such a state at every look at the held-out lessons.

    Returns: the best soft prompt with its joint detector, and {"curve": a row per step, "held_out": a row per look,
        "best_step"}.
    """
    trainable.model.requires_grad_(False)
    module = SoftPrompt(lvlm, recipe.length)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / recipe.steps)
    progress: dict[str, Any] = {"curve": [], "held_out": [], "best_step": 0}
    best = {name: value.detach().clone() for name, value in module.state_dict().items()}
    if state is not None:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        progress, best = state["progress"], state["best"]
    pools = {"refuse": [lesson for lesson in lessons if lesson.refusal is not None],
             "benign": [lesson for lesson in lessons if lesson.refusal is None]}
    for step in range(len(progress["curve"]), recipe.steps):
        if _stopped(progress, recipe):
            break
        rng = random.Random(f"{recipe.seed} {step}")  # a step's lessons do not depend on where training was resumed
        batch = [rng.choice(pool) for pool in pools.values() for _ in range(recipe.batch // 2)]
        cuts = [random_cut(lesson, recipe, rng) for lesson in batch]
        optimizer.zero_grad()
        with lvlm.lock:  # for a step at a time: runs on the same model wait for one, not for the training
            row = _row(*losses(trainable, module, batch, cuts, recipe), batch)
            _total(row, recipe).backward()
        nn.utils.clip_grad_norm_([module.soft], 1.0)
        optimizer.step()
        schedule.step()
        progress["curve"].append({name: round(value.item(), 4) for name, value in row.items()})
        report(step + 1, recipe.steps)
        if held_out and (step + 1) % recipe.check_every == 0:
            with lvlm.lock:
                row = _look(trainable, module, held_out, recipe)
            total = float(_total(row, recipe))
            if all(total < look["total"] for look in progress["held_out"]):
                progress["best_step"] = step + 1
                best = {name: value.detach().clone() for name, value in module.state_dict().items()}
            progress["held_out"].append({"step": step + 1, "total": round(total, 4),
                                         **{name: round(value.item(), 4) for name, value in row.items()}})
            save({"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                  "schedule": schedule.state_dict(), "progress": progress, "best": best})
    if progress["best_step"]:
        module.load_state_dict(best)
    return module.artifact(), progress


def _stopped(progress: dict[str, Any], recipe: Recipe) -> bool:
    """No better held-out loss for `patience` looks?"""
    looks = progress["held_out"]
    return bool(looks) and looks[-1]["step"] - progress["best_step"] >= recipe.patience * recipe.check_every


def _row(language: Tensor, detector: Tensor, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
    """Mean losses of a batch, harmful and benign apart."""
    harmful = torch.tensor([lesson.refusal is not None for lesson in lessons], device=language.device)
    return {"refuse": language[harmful].mean(), "benign": language[~harmful].mean(), "detector": detector.mean()}


def _total(row: dict[str, Tensor], recipe: Recipe) -> Tensor:
    return row["refuse"] + recipe.benign_weight * row["benign"] + recipe.detector_weight * row["detector"]


@torch.no_grad()
def _look(trainable: LVLM, module: SoftPrompt, lessons: Sequence[Lesson], recipe: Recipe) -> dict[str, Tensor]:
    """Mean losses on held-out lessons, always behind the same prefixes."""
    rng = random.Random(recipe.seed)
    cuts = [random_cut(lesson, recipe, rng) for lesson in lessons]
    parts = [losses(trainable, module, lessons[start:start + recipe.batch], cuts[start:start + recipe.batch], recipe)
             for start in range(0, len(lessons), recipe.batch)]
    language, detector = (torch.cat(column) for column in zip(*parts, strict=True))
    return _row(language, detector, lessons)
