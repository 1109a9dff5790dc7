"""Train SAPT's soft prompt and its joint detector (arXiv 2506.15734, section 3.3).

L = L_refuse + alpha L_benign + beta L_detector: behind a harmful prefix of random length (empty for one third) the
soft prompt leads to a refusal, behind a benign one to its own continuation; the detector reads the state of the last
soft token. The model is frozen, and what stands before the soft prompt needs no gradient: it is a cache, made by the
model as it is served, while gradients pass through a copy of the same weights in a differentiable number format.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import DynamicCache

from safety.artifacts import SaptArtifact
from safety.calibrate.activations import append_ids
from safety.detector import Probe, fit_probe
from safety.inputs import open_image
from safety.lvlm import LVLM

INSTRUCTION = "Refuse if the partial output is unsafe; otherwise continue helpfully."


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the paper's, except where a comment says otherwise."""

    length: int = 4
    benign_weight: float = 1.0  # alpha
    detector_weight: float = 0.05  # beta, of the released code
    learning_rate: float = 1e-3  # 1e-4 in the paper, for 7B models and more steps
    weight_decay: float = 0.01
    batch: int = 4
    epochs: int = 2
    target_tokens: int = 24  # ours: targets are cut, the first words decide
    empty_share: float = 1 / 3
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A request, the undefended model's answer to it, and, where the request is harmful, the refusal to learn."""

    prompt: str
    image: str | None
    answer: str
    refusal: str | None


class SoftPrompt(nn.Module):
    """The trained parameters: soft [length, width], detector weight [width] and bias []."""

    def __init__(self, lvlm: LVLM, length: int) -> None:
        super().__init__()
        ids = lvlm.tokenizer(INSTRUCTION, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        with torch.no_grad():
            words = lvlm.embed(ids.to(lvlm.device)).float()
        # The instruction's embeddings, pooled into as many pieces as there are soft tokens.
        self.soft = nn.Parameter(torch.stack([piece.mean(0) for piece in words.tensor_split(length)]).clone())
        self.weight = nn.Parameter(torch.zeros(lvlm.width, device=lvlm.device))
        self.bias = nn.Parameter(torch.zeros((), device=lvlm.device))

    def artifact(self) -> SaptArtifact:
        """The soft prompt with its joint detector."""
        probe = Probe(self.weight.detach().clone(), self.bias.detach().clone())
        return SaptArtifact(self.soft.detach().clone(), {"joint": probe})


def losses(lvlm: LVLM, trainable: LVLM, module: SoftPrompt, lesson: Lesson, recipe: Recipe,
           rng: random.Random) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the target behind the soft prompt, detector loss) of one lesson with a random prefix.

    `lvlm` reads the prefix; gradients pass through `trainable`, which may be the same model.
    """
    answer = lvlm.tokenizer(lesson.answer, add_special_tokens=False)["input_ids"]
    end = [min(lvlm.eos_ids)] if lvlm.eos_ids else []
    cut = 0 if rng.random() < recipe.empty_share else rng.randint(1, len(answer)) if answer else 0
    if lesson.refusal is not None:
        target = lvlm.tokenizer(lesson.refusal, add_special_tokens=False)["input_ids"] + end
    else:
        target = (answer + end)[cut:]
    target = target[:recipe.target_tokens]
    cache = _prefix_cache(lvlm, lesson, answer[:cut])
    ids = torch.tensor([target], device=lvlm.device)
    embeds = torch.cat([module.soft[None], lvlm.embed(ids[:, :-1]).float()], 1).to(trainable.embed.weight.dtype)
    states = trainable.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[0]
    behind = states[recipe.length - 1:]  # the last soft token, then every target token but the last
    logit = behind[0].float() @ module.weight + module.bias
    harmful = torch.full_like(logit, float(lesson.refusal is not None))
    return (cross_entropy(trainable.lm_head(behind).float(), ids[0]),
            binary_cross_entropy_with_logits(logit, harmful))


@torch.no_grad()
def _prefix_cache(lvlm: LVLM, lesson: Lesson, ids: list[int]) -> DynamicCache:
    inputs = lvlm.prepare(lesson.prompt, open_image(lesson.image) if lesson.image else None, 0)
    cache = DynamicCache()
    lvlm.model.base_model(**append_ids(inputs, ids), past_key_values=cache, use_cache=True)
    return cache


def train(lvlm: LVLM, trainable: LVLM, lessons: Sequence[Lesson], recipe: Recipe = Recipe(),
          report: Callable[[dict[str, float]], None] = lambda row: None,
          state: dict[str, Any] | None = None, save: Callable[[dict[str, Any]], None] = lambda state: None
          ) -> SaptArtifact:
    """Train on the lessons, half harmful and half benign per batch.

    Args:
        lvlm, trainable: see `losses`.
        report: called with {"step", "steps", "refuse", "benign", "detector"} after every optimiser step.
        state: where to resume from; save: called with such a state every 20 steps.
    """
    trainable.model.requires_grad_(False)
    module = SoftPrompt(lvlm, recipe.length)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    harmful = [lesson for lesson in lessons if lesson.refusal is not None]
    benign = [lesson for lesson in lessons if lesson.refusal is None]
    half = recipe.batch // 2
    steps = recipe.epochs * max(len(harmful), len(benign)) // half
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / steps)
    first = 0
    if state is not None:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    for step in range(first, steps):
        rng = random.Random(f"{recipe.seed} {step}")  # a step's lessons do not depend on where training was resumed
        totals = {"refuse": 0.0, "benign": 0.0, "detector": 0.0}
        optimizer.zero_grad()
        for kind, pool, weight in (("refuse", harmful, 1.0), ("benign", benign, recipe.benign_weight)):
            for lesson in rng.sample(pool, half):
                language, detector = losses(lvlm, trainable, module, lesson, recipe, rng)
                (weight * language / half + recipe.detector_weight * detector / recipe.batch).backward()
                totals[kind] += language.item() / half
                totals["detector"] += detector.item() / recipe.batch
        nn.utils.clip_grad_norm_([module.soft], 1.0)
        optimizer.step()
        schedule.step()
        report({"step": step + 1, "steps": steps, **totals})
        if (step + 1) % 20 == 0:
            save({"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                  "schedule": schedule.state_dict(), "step": step + 1})
    return module.artifact()


@torch.inference_mode()
def soft_state(lvlm: LVLM, soft: Tensor, prompt: str, image: str | None = None, answer: str = "") -> Tensor:
    """[width] post-norm state of the last soft token behind a request and a partial answer."""
    lesson = Lesson(prompt, image, answer, None)
    cache = _prefix_cache(lvlm, lesson, lvlm.tokenizer(answer, add_special_tokens=False)["input_ids"])
    embeds = soft[None].to(lvlm.embed.weight)
    return lvlm.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state[0, -1].float()


def frozen_detector(lvlm: LVLM, soft: Tensor, harmful: Sequence[str], harmless: Sequence[str]) -> Probe:
    """The released code's kind of detector: PCA to 4 components and logistic regression on text-only instructions,
    each followed by the soft prompt."""
    states = torch.stack([soft_state(lvlm, soft, prompt) for prompt in [*harmful, *harmless]])
    labels = [1] * len(harmful) + [0] * len(harmless)
    return fit_probe(states.cpu().numpy(), labels, pca=4)  # type: ignore[arg-type]
