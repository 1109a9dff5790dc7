"""The vision tower as a whole: reader and dictionary trained on, end to end, towards the token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safety.mini.ahead import Ahead
from safety.mini.dictionary import CODE_NORM, DICTIONARY_CHECKPOINT, FILLER, Dictionary, Entries, TokenTargets
from safety.mini.lexicon import Lexicon
from safety.mini.scenes import SceneMaker
from safety.mini.train_vision import (
    BATCH,
    Batch,
    load_reader,
    look_at_handwriting,
    make_batch,
    mixed_batch,
    on,
    save_checkpoint,
    symbol_spots,
    train_loop,
)
from safety.mini.vision import Reader, build_tower, letter_table, pick

JOINT_CHECKPOINT = "joint.pt"
TOWER_CHECKPOINT = "tower.pt"
DICTIONARY_RATE, READING_RATE = 1e-3, 1.3e-3
SPOTS = 288  # word patches and blank patches of a step
PRACTICE = 1472  # further dictionary entries of a step
SPELLING = {"character": 0.2, "kind": 1.0, "letters": 0.7, "code": 0.5}  # weights of the reader's own losses
VALIDATION_IMAGES = 32


class Joint(nn.Module):
    """A reader and a dictionary on the same tower.

    Attributes:
        reader, dictionary: the two halves.
        stretch: length of the reader's states in units of the dictionary's; 1 once the halves are connected.
    """

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.reader = Reader(build_tower())
        self.dictionary = Dictionary(self.reader.tower, text_width)
        self.stretch: Tensor
        self.register_buffer("stretch", torch.ones(()))

    @torch.no_grad()
    def measure_stretch(self, batch: Batch) -> None:
        """Set ``stretch`` from the states at a batch's word patches."""
        pixels, labels = batch
        _, states, _ = self.reader.read(pixels)
        self.stretch.copy_(states[labels["word"] >= 0].norm(dim=-1).mean() / CODE_NORM)

    @torch.no_grad()
    def connect(self) -> None:
        """Build ``stretch`` into the weights, without changing what the tower says.

        Norms make a block blind to the length of its input, so scaling what the dictionary blocks add and unscaling
        before the projector is exact.
        """
        for block in self.dictionary.blocks:
            block.feed_forward.down_proj.weight.mul_(self.stretch)
        self.dictionary.projector.linear_1.weight.div_(self.stretch)
        self.stretch.fill_(1.0)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to states after the character block, after the reading blocks, and projected [n, 196, text_width]."""
        middle, states, _ = self.reader.read(pixels)
        return middle, states, self.dictionary(states / self.stretch)


def load_tower(folder: Path, text_width: int) -> Joint:
    """The finished tower of a build folder."""
    joint = Joint(text_width)
    joint.load_state_dict(torch.load(folder / TOWER_CHECKPOINT, map_location="cpu", weights_only=True)["model"])
    return joint.eval()


def token_rates(joint: Joint, targets: TokenTargets, tokens: Tensor, batch: Batch) -> dict[str, float]:
    """Word patches whose nearest token is right, how alike they are, and how alike blank patches and the filler are."""
    pixels, labels = batch
    said = joint(pixels)[2].float()
    here = labels["word"] >= 0
    wanted = targets.rows(tokens[labels["word"][here], labels["part"][here]])
    return {
        "token": (targets.guess(said[here]) == wanted).float().mean().item(),
        "alike": F.cosine_similarity(said[here], targets.vectors[wanted], dim=-1).mean().item(),
        "blank": F.cosine_similarity(said[~here], targets.filler, dim=-1).mean().item(),
    }


def train_joint(
    tokenizer: Any,
    embedding: Tensor,
    lexicon: Lexicon,
    folder: Path,
    *,
    steps: int = 1100,
    seed: int = 0,
    device: str = "cpu",
) -> Joint:
    """Train reader and dictionary together; ``folder/tower.pt`` holds the finished tower.

    The dictionary learns what the reader really writes and what blank patches hold; the reader learns what the
    dictionary needs, and keeps spelling.

    Args:
        tokenizer: of the language model.
        embedding: [vocabulary, text_width] its token embeddings, frozen.
        lexicon: words to draw.
        folder: where checkpoints are read and written.
        steps: batches of pictures.
        seed: of the pictures.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(seed)
    joint = Joint(embedding.shape[1])
    # The reader's checkpoint also holds the dictionary blocks, untrained: the dictionary's come second.
    joint.reader.load_state_dict(load_reader(folder).state_dict())
    handwriting = look_at_handwriting(joint.reader.to(device), lexicon, seed)
    saved = torch.load(folder / DICTIONARY_CHECKPOINT, map_location="cpu", weights_only=True)
    joint.dictionary.load_state_dict(saved["model"])
    joint.to(device)
    entries = Entries(tokenizer, lexicon, seed)
    tokens = torch.from_numpy(lexicon.tokens).to(device)
    targets = TokenTargets(embedding.to(device), entries.tokens.to(device), tokenizer.encode(FILLER)[0])
    maker, letters = SceneMaker(lexicon), letter_table(lexicon).to(device)
    joint.measure_stretch(on(make_batch(maker, (seed, 4), BATCH), device))
    checks = {
        kind: on(make_batch(maker, (seed, 5), VALIDATION_IMAGES, kind), device) for kind in ("list", "text", "picture")
    }

    def drawn(step: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
        # The dictionary goes on practising words that these pictures do not show.
        practice = entries.draw(PRACTICE, seed * 1_000_003 + 500_000 + step, handwriting)
        return mixed_batch(maker, (seed, 7, step)), practice

    ahead = Ahead(drawn, steps, device)

    def loss_of(step: int) -> dict[str, Tensor]:
        batch, (codes, practised) = ahead(step)
        pixels, labels = on(batch, device)
        middle, states, _ = joint.reader.read(pixels)
        here = labels["word"] >= 0
        blanks, spots = pick(~here, SPOTS), torch.cat([pick(here, SPOTS), symbol_spots(here)])
        real = states.flatten(0, 1).float() / joint.stretch
        said = joint.dictionary(torch.cat([real[spots], codes.to(device), real[blanks]])).float()
        shown = tokens[labels["word"].flatten()[spots], labels["part"].flatten()[spots]]
        rows = targets.rows(torch.cat([shown, practised.to(device)]))
        losses = targets.losses(said[: len(spots)], rows[: len(spots)], len(spots))
        practice = targets.losses(said[len(spots) : -SPOTS], rows[len(spots) :], PRACTICE // 6)
        blank = (said[-SPOTS:] - targets.filler).pow(2).sum(-1).mean() / targets.filler.pow(2).sum()
        losses |= {"practice": 0.7 * torch.stack(list(practice.values())).sum(), "blank": 1.5 * blank}
        spelling = joint.reader.losses(middle, states, labels, letters, spots)
        return losses | {name: SPELLING[name] * loss for name, loss in spelling.items()}

    def measure() -> dict[str, float]:
        return {
            f"{kind} {name}": value
            for kind, batch in checks.items()
            for name, value in token_rates(joint, targets, tokens, batch).items()
        }

    train_loop(
        joint,
        [*joint.dictionary.optimisers(DICTIONARY_RATE), *joint.reader.optimisers(READING_RATE)],
        loss_of,
        measure,
        steps=steps,
        checkpoint=folder / JOINT_CHECKPOINT,
        name="Joint",
        decay=0.95,
        measure_every=50,
        seed=seed,
    )
    joint.connect()
    save_checkpoint(folder / TOWER_CHECKPOINT, {"model": joint.state_dict()})
    return joint
