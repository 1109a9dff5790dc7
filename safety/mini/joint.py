"""The vision tower as a whole: reading blocks, dictionary and projector trained together on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safety.mini.dictionary import CODE_NORM, DICTIONARY_CHECKPOINT, FILLER, Dictionary, Entries, TokenTargets
from safety.mini.lexicon import PICTURE, Lexicon
from safety.mini.scenes import SceneMaker
from safety.mini.train_vision import (
    BATCH,
    READING_CHECKPOINT,
    SPOTS,
    VALIDATION_IMAGES,
    Batch,
    adamw,
    make_batch,
    on,
    train_loop,
)
from safety.mini.vision import Reader, build_tower, letter_table, pick, reading_rates

JOINT_CHECKPOINT = "joint.pt"
LEARNING_RATE = 1e-3
PRACTICE = 2048  # dictionary entries of a step


class Joint(nn.Module):
    """A reader and a dictionary on the same tower."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.reader = Reader(build_tower())
        self.dictionary = Dictionary(self.reader.tower, text_width)

    @torch.no_grad()
    def connect(self, pixels: Tensor, said: Tensor) -> float:
        """Fit the dictionary to the length of the reader's states, without changing what it says.

        Norms make a block blind to the length of its input, so scaling what the dictionary blocks add and unscaling
        before the projector is exact.

        Args:
            pixels: some pictures, [n, 3, 224, 224].
            said: [n, 196] whether a patch stands for a word.

        Returns:
            The factor between the reader's lengths and the dictionary's.
        """
        _, states, _ = self.reader.read(pixels)
        factor = float(states[said].norm(dim=-1).mean()) / CODE_NORM
        for block in self.dictionary.blocks:
            block.feed_forward.down_proj.weight.mul_(factor)
        self.dictionary.projector.linear_1.weight.div_(factor)
        return factor

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with learning rates in proportion to the scale of the weights after :meth:`connect`."""
        first = self.dictionary.projector.linear_1.weight
        down = [block.feed_forward.down_proj.weight for block in self.dictionary.blocks]
        special = {id(first), *map(id, down)}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in special]
        return [
            {"params": rest, "lr": LEARNING_RATE},
            {"params": down, "lr": 2 * LEARNING_RATE},
            {"params": [first], "lr": 0.08 * LEARNING_RATE},
        ]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to states after the character block, after the reading blocks, and projected [n, 196, text_width]."""
        middle, states, _ = self.reader.read(pixels)
        return middle, states, self.dictionary(states)


def load_parts(folder: Path, text_width: int, lexicon: Lexicon, seed: int) -> Joint:
    """A joint model from the joint checkpoint, or from the reading and dictionary checkpoints, connected."""
    joint = Joint(text_width)
    if (folder / JOINT_CHECKPOINT).exists():
        joint.load_state_dict(torch.load(folder / JOINT_CHECKPOINT, weights_only=True)["model"])
        return joint
    # The reader's checkpoint also holds the dictionary blocks, untrained: the dictionary's come second.
    joint.reader.load_state_dict(torch.load(folder / READING_CHECKPOINT, weights_only=True)["model"])
    joint.dictionary.load_state_dict(torch.load(folder / DICTIONARY_CHECKPOINT, weights_only=True)["model"])
    pixels, labels = make_batch(SceneMaker(lexicon), (seed, 4), BATCH)
    joint.connect(pixels, labels["word"] >= 0)
    return joint


def token_rates(joint: Joint, targets: TokenTargets, tokens: Tensor, batch: Batch, picture: int) -> dict[str, float]:
    """Shares of word patches that say their token, over all tokens, first tokens of words and of picture names."""
    pixels, labels = batch
    _, _, said = joint(pixels)
    here = labels["word"] >= 0
    wanted = tokens[labels["word"][here], labels["part"][here]]
    right = targets.guess(said[here]) == targets.rows(wanted)
    plain = labels["word"][here] != picture
    nothing = torch.nn.functional.cosine_similarity(said[~here].float(), targets.filler, dim=-1)
    return {"token": right[plain].float().mean().item(), "filler": nothing.mean().item()}


def train_joint(
    tokenizer: Any,
    embedding: Tensor,
    lexicon: Lexicon,
    folder: Path,
    *,
    images: int = 30_000,
    seed: int = 0,
    device: str = "cpu",
) -> Joint:
    """Train everything on pictures, starting from the two halves; ``folder/joint.pt`` holds the run.

    Args:
        tokenizer: of the language model.
        embedding: [vocabulary, text_width] its token embeddings, frozen.
        lexicon: words to draw.
        folder: where checkpoints are read and written.
        images: training pictures in total.
        seed: of the pictures.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(seed)
    joint = load_parts(folder, embedding.shape[1], lexicon, seed).to(device)
    letters, tokens = letter_table(lexicon).to(device), torch.from_numpy(lexicon.tokens).to(device)
    entries = Entries(tokenizer, lexicon, seed)
    targets = TokenTargets(embedding.to(device), entries.tokens.to(device), tokenizer.encode(FILLER)[0])
    maker, hidden = SceneMaker(lexicon), SceneMaker(lexicon, held_out=True)
    checks = {
        name: on(batch, device)
        for name, batch in {
            "seen": make_batch(maker, (seed, 1), VALIDATION_IMAGES),
            "unseen": make_batch(hidden, (seed, 2), VALIDATION_IMAGES),
            "pictures": make_batch(maker, (seed, 5), VALIDATION_IMAGES, "picture"),
            "lists": make_batch(hidden, (seed, 6), VALIDATION_IMAGES // 2, "list"),
        }.items()
    }

    def loss_of(step: int) -> dict[str, Tensor]:
        pixels, labels = on(make_batch(maker, (seed, 7, step)), device)
        middle, states, _ = joint.reader.read(pixels)
        here = labels["word"] >= 0
        spots, blanks = pick(here, SPOTS), pick(~here, SPOTS)
        losses = joint.reader.losses(middle, states, labels, letters, spots)
        flat = states.flatten(0, 1)
        # The dictionary goes on practising words that these pictures do not show, at the reader's present length.
        codes, practised = entries.draw(PRACTICE, seed * 1_000_003 + 500_000 + step)
        length = flat[spots].detach().norm(dim=-1).mean() / CODE_NORM
        said = joint.dictionary(torch.cat([flat[spots], codes.to(device) * length, flat[blanks]])).float()
        wanted = torch.cat(
            [tokens[labels["word"].flatten()[spots], labels["part"].flatten()[spots]], practised.to(device)]
        )
        rows = targets.rows(wanted)
        sharpness = joint.dictionary.sharpness
        contrast, distance = targets.loss(said[:SPOTS], rows[:SPOTS], sharpness)
        practice, practice_distance = targets.loss(said[SPOTS:-SPOTS], rows[SPOTS:], sharpness)
        filler = (said[-SPOTS:] - targets.filler).pow(2).sum(-1).mean() / targets.scale**2
        return {
            "character": 0.5 * losses["character"],
            "kind": losses["kind"],
            "letters": losses["letters"],
            "code": 0.5 * losses["code"],
            "contrast": contrast,
            "distance": distance,
            "practice": practice + practice_distance,
            "filler": filler,
        }

    def measure() -> dict[str, float]:
        rates: dict[str, float] = {}
        for label, batch in checks.items():
            found = token_rates(joint, targets, tokens, batch, lexicon.index[PICTURE])
            if label in ("seen", "unseen"):
                middle, states, _ = joint.reader.read(batch[0])
                found |= reading_rates(joint.reader, middle, states, batch[1], letters)
            rates |= {f"{label} {key}": value for key, value in found.items()}
        return rates

    train_loop(
        joint,
        [adamw(joint.groups(), LEARNING_RATE)],
        loss_of,
        measure,
        steps=images // BATCH,
        checkpoint=folder / JOINT_CHECKPOINT,
        name="Joint",
        decay=0.7,
    )
    return joint
