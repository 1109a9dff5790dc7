"""The decode loop, the only one in the project: all rows go on, token by token, until every one has ended.

A row of the batch is one lane of one request. The image is encoded once, the prompt prefilled once per request; what
a defense changes, it changes for its own rows only. Hooks live for single forward passes, so nothing is left on the
model between two tokens, whatever becomes of the generator.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from safety.artifacts import Artifacts
from safety.defenses import Window, revision, sasa
from safety.defenses.sapt import Watch
from safety.lvlm import LVLM, Trunk, hooks
from safety.settings import Lane, Revision, Sampling, Sasa
from safety.transcript import Event, Step

ALTERNATIVES = 5  # likeliest tokens that a Step names
REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(frozen=True)
class Typed:
    """A request as text for SASA's mode "reading". read: its picture in words; inputs, prepared without a picture: the
    words, the prompt, and the words above the prompt, or the prompt alone where nothing was read; positions: how many
    the decoder ran to read, and runs to judge."""

    read: str
    inputs: tuple[dict[str, Tensor], ...]
    positions: int


def typed_states(lvlm: LVLM, trunk: Trunk, typed: Typed | None) -> Tensor:
    """[3 * width] post-norm last states of the request's three forms as text; three times that of the prompt where no
    words were read, and of the request itself where it has no picture."""
    if typed is None:
        return trunk.hidden.repeat(3)
    states = [lvlm.prefill(inputs, set()).hidden for inputs in typed.inputs]
    return torch.cat(states * (3 // len(states)))


@dataclass
class Row:
    """The state of one lane of one request."""

    request: int
    lane: int
    cache: DynamicCache
    hidden: Tensor  # [width], post-norm, where the next token is chosen
    length: int
    offset: int
    last_id: int
    generator: torch.Generator
    revision: Revision | None = None
    delta: Tensor | None = None
    band: sasa.Band | None = None
    watch: Watch | None = None
    gated: bool = False  # SASA refused: the row says `forced` and ends
    forced: list[int] = field(default_factory=list)
    held: int | None = None  # an end-of-answer token that waits for SAPT's last check
    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    said: int = 0  # characters of text already emitted
    layers: tuple[float, ...] = ()  # P(harm) of the prompt behind each block, for the row's first step
    log_odds: float | None = None  # of harm, as the trace follows it


class Run:
    """One run: the rows, their shared cache, and the columns of it that each row sees."""

    def __init__(self, lvlm: LVLM, artifacts: Artifacts, lanes: Sequence[Lane], limit: int, sampling: Sampling) -> None:
        self.lvlm = lvlm
        self.artifacts = artifacts
        self.lanes = lanes
        self.limit = limit
        self.sampling = sampling
        self.rows: list[Row] = []
        self.cache = DynamicCache()
        self.mask = torch.empty(0)
        self.refusal: list[int] = lvlm.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]

    def steps(self, inputs: list[dict[str, Tensor]], cancel: threading.Event, typed: Sequence[Typed | None] = (),
              began: float | None = None) -> Iterator[Step]:
        """Prefill, then choose a token per row, emit it, and advance, until every row has ended.

        Args:
            typed: what each request's picture says, where a lane judges that as well; None for one without a picture.
            began: when the run began (`time.perf_counter`), if something was done for it before.
        """
        began = time.perf_counter() if began is None else began
        for request, tensors in enumerate(inputs):
            if cancel.is_set():
                return
            self._prefill(request, tensors, typed[request] if typed else None)
        self._stack()
        if any(row.revision and row.revision.positions == "last" for row in self.rows):
            self._replay_last_position()
        first_checks = [row.watch is not None and row.watch.due(0) for row in self.rows]
        if any(first_checks):
            self._advance([None] * len(self.rows), first_checks)
        prefill_seconds = time.perf_counter() - began

        while self.rows and not cancel.is_set():
            hidden = torch.stack([row.hidden for row in self.rows])
            logits = self.lvlm.logits(hidden)
            trace = self.artifacts.trace
            log_odds = trace.probe.log_odds(hidden).tolist() if trace else []
            total = logits.logsumexp(-1)
            likeliest = logits.topk(min(ALTERNATIVES, logits.shape[-1]))
            chances = (likeliest.values - total[:, None]).exp().tolist()
            ids = likeliest.indices.tolist()
            alive: list[int] = []
            tokens: list[int | None] = []
            checks: list[bool] = []
            for number, row in enumerate(self.rows):
                token = self._choose(row, logits[number])
                if token in self.lvlm.eos_ids and row.watch and row.watch.due_at_end(len(row.ids)):
                    row.held = token
                    alive.append(number)
                    tokens.append(None)
                    checks.append(True)
                    continue
                if trace:
                    row.log_odds = trace.follow(row.log_odds, log_odds[number])
                step = self._emit(row, token, time.perf_counter() - began, prefill_seconds)
                others = [(self.lvlm.text([other]), p) for other, p in zip(ids[number], chances[number], strict=True)]
                step = replace(step, probability=(logits[number, token] - total[number]).exp().item(),
                               alternatives=tuple(others), prompt_tokens=row.length,
                               layers=row.layers if step.index == 0 else ())
                yield step
                if step.finish is None:
                    alive.append(number)
                    tokens.append(token)
                    checks.append(row.watch is not None and row.watch.due(len(row.ids)))
            self._keep(alive)
            if self.rows and not cancel.is_set():
                self._advance(tokens, checks)

    def _prefill(self, request: int, inputs: dict[str, Tensor], typed: Typed | None) -> None:
        gates = [lane.sasa for lane in self.lanes if lane.sasa and lane.sasa.mode == "gate"]
        with self._block_ends() as ends:
            trunk = self.lvlm.prefill(inputs, {block for gate in gates if self.artifacts.sasa
                                               for pair in sasa.pairs(gate, self.artifacts.sasa) for block in pair})
        depths = self._depths(ends)
        typed_hidden = typed_states(self.lvlm, trunk, typed)
        verdicts: dict[Sasa, float] = {}
        for index, lane in enumerate(self.lanes):
            generator = torch.Generator().manual_seed(self.sampling.seed)
            row = Row(request, index, trunk.cache, trunk.hidden, trunk.length, trunk.offset, trunk.last_id, generator)
            row.layers = depths
            self.rows.append(row)
            if lane.sasa and lane.sasa.mode != "project":
                assert self.artifacts.sasa is not None  # checked at the edge
                key = replace(lane.sasa, threshold=0.0)
                if key not in verdicts:
                    verdicts[key] = sasa.judge(self.lvlm, trunk, lane.sasa, self.artifacts.sasa, typed_hidden)
                fired = verdicts[key] >= lane.sasa.threshold
                read = (typed.read, typed.positions) if typed and lane.sasa.mode == "reading" else ()
                row.events.append(Event("gate", 0, verdicts[key], lane.sasa.threshold, fired, *read))
                if fired:  # the lane refuses: nothing further acts on it
                    row.gated, row.forced = True, list(self.refusal)
                    continue
            if lane.sasa and lane.sasa.mode == "project":
                row.band = sasa.Band(self.lvlm, lane.sasa)
            if lane.revision:
                assert self.artifacts.revision is not None
                row.revision = lane.revision
                row.delta = revision.delta(lane.revision, self.artifacts.revision).to(self.lvlm.device)
            if lane.sapt:
                assert self.artifacts.sapt is not None
                row.watch = Watch(lane.sapt, self.artifacts.sapt)
            if row.band or (row.revision and row.revision.positions == "all"):
                self._own_prefill(row, trunk)

    @contextmanager
    def _block_ends(self) -> Iterator[list[Tensor]]:
        """Inside, collect [width]: each block's output at the last position; nothing where no block has a probe."""
        ends: list[Tensor] = []
        with hooks() as add:
            for layer in self.lvlm.layers if self.artifacts.layers else ():
                add(layer.register_forward_hook(lambda module, args, output: ends.append(output[0, -1])))
            yield ends

    def _depths(self, ends: list[Tensor]) -> tuple[float, ...]:
        """P(harm) behind each block."""
        probes = self.artifacts.layers
        if probes is None:
            return ()
        states = torch.stack([end.to(probes.weight.device) for end in ends]).float()
        return tuple(torch.sigmoid((states * probes.weight).sum(-1) + probes.bias).tolist())

    def _own_prefill(self, row: Row, trunk: Trunk) -> None:
        """This row's edits reach into the prompt: run the decoder on the prompt's embeddings once more, for it."""
        row.cache = DynamicCache()
        with self._edits([row], prompt=True):
            row.hidden = self.lvlm.rerun_decoder(trunk, row.cache)

    def _stack(self) -> None:
        """One cache for all rows, shorter prompts padded on the left with columns that nobody sees."""
        width = max(row.length for row in self.rows)
        self.cache = _join([row.cache for row in self.rows], width)
        for row in self.rows:
            if row.band:
                row.band.cache = _join([row.band.cache], width)
        columns = torch.arange(width, device=self.lvlm.device)
        starts = torch.tensor([width - row.length for row in self.rows], device=self.lvlm.device)
        self.mask = (columns >= starts[:, None]).long()

    def _replay_last_position(self) -> None:
        """Revised rows change the last prompt position: run it again as the first decoding step."""
        self._crop(1)
        self.mask = self.mask[:, :-1]
        self._advance([row.last_id for row in self.rows], [False] * len(self.rows))

    def _advance(self, tokens: list[int | None], checks: list[bool]) -> None:
        """Feed each row its token (or none) and, where a check is due, the soft prompt behind it, in one forward pass.

        SAPT's tentative columns are kept where the detector fired and hidden from, or rolled back for, the others.
        """
        device, rows = self.lvlm.device, len(self.rows)
        soft = self.artifacts.sapt.soft if self.artifacts.sapt and any(checks) else None
        extra = 0 if soft is None else len(soft)
        fed = torch.tensor([[token is not None] for token in tokens], device=device).long()
        checked = torch.tensor(checks, device=device).long()[:, None].expand(rows, extra)
        embeds = self.lvlm.embed(torch.tensor([[token or 0] for token in tokens], device=device))
        if soft is not None:
            embeds = torch.cat([embeds, soft.to(embeds).expand(rows, -1, -1)], 1)
        offsets = torch.tensor([[row.offset] for row in self.rows], device=device)
        first = self.mask.sum(1, keepdim=True) + offsets
        positions = torch.cat([first, first + fed + torch.arange(extra, device=device)], 1)
        with self._edits(self.rows):
            states = self.lvlm.decode(embeds, torch.cat([self.mask, fed, checked], 1), positions, self.cache)

        fired = torch.zeros(rows, 1, dtype=torch.long, device=device)
        for number, row in enumerate(self.rows):
            if tokens[number] is not None:
                row.hidden = states[number, 0]
            if checks[number]:
                assert row.watch is not None
                probability = row.watch.detector.probability(states[number, -1]).item()
                index, threshold = len(row.ids), row.watch.settings.threshold
                fires = row.watch.decide(index, probability)
                row.events.append(Event("check", index, probability, threshold, fires))
                if fires:
                    row.events.append(Event("injection", index, probability, threshold, True))
                    row.hidden, row.held = states[number, -1], None
                    fired[number] = 1
        self.mask = torch.cat([self.mask, fed], 1)
        if fired.any():
            self.mask = torch.cat([self.mask, fired.expand(rows, extra)], 1)
        elif extra:
            self._crop(extra)

    def _choose(self, row: Row, logits: Tensor) -> int:
        if row.forced:
            return row.forced.pop(0)
        if row.held is not None:
            return row.held
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()  # less their maximum, so that no temperature makes one infinite
        probabilities = torch.softmax((logits - logits.max()) / self.sampling.temperature, -1).float()
        ranked, order = probabilities.sort(descending=True, stable=True)
        ranked = ranked * (ranked.cumsum(-1) - ranked < self.sampling.top_p)  # the smallest set that holds top_p
        return int(order[torch.multinomial(ranked, 1, generator=row.generator)])

    def _emit(self, row: Row, token: int, seconds: float, prefill_seconds: float) -> Step:
        index = len(row.ids)
        harm = None if row.log_odds is None else torch.tensor(row.log_odds).sigmoid().item()
        row.ids.append(token)
        finish: Literal["eos", "length", "gate"] | None = None
        if row.gated and not row.forced:
            finish = "gate"
        elif token in self.lvlm.eos_ids:
            finish = "eos"
        elif len(row.ids) == self.limit:
            finish = "length"
        text = self.lvlm.text(row.ids)
        piece = ""
        if finish is not None or not text.endswith("\ufffd"):  # wait for the rest of a character
            piece, row.said = text[row.said:], len(text)
        events, row.events = tuple(row.events), []
        return Step(row.request, row.lane, index, token, piece, harm, events, finish, seconds, prefill_seconds)

    def _keep(self, alive: list[int]) -> None:
        """Drop the rows that have ended from the batch."""
        if len(alive) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in alive]
        if alive:
            index = torch.tensor(alive)  # on the CPU: the cache of a model may be spread over several GPUs
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]

    def _crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        for row in self.rows:
            if row.band:
                row.band.cache.crop(-columns)

    @contextmanager
    def _edits(self, rows: list[Row], prompt: bool = False) -> Iterator[None]:
        """Install what the defenses of these rows change in the forward pass inside; take it off behind it.

        Revision comes before SASA's band at the same block, so the band projects revised states; inside the band,
        which re-runs blocks for one row, only that row's revision applies.
        """
        window = Window()
        added: dict[tuple[int, str], Tensor] = {}
        for number, row in enumerate(rows):
            if row.revision and row.delta is not None and (not prompt or row.revision.positions == "all"):
                key = (row.revision.layer, row.revision.level)
                added.setdefault(key, row.delta.new_zeros(len(rows), 1, len(row.delta)))[number, 0] = row.delta
        with hooks() as add:
            for (layer, level), tensor in added.items():
                add(revision.register(self.lvlm, layer, level, tensor, window))
            for number, row in enumerate(rows):
                if row.band:
                    row.band.hook(number, len(rows), window, add)
            yield


def _join(caches: Sequence[DynamicCache], width: int) -> DynamicCache:
    """Stack batch-1 caches into one, padding each on the left to `width` columns; copies, shares nothing."""
    joined = DynamicCache()
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if layers[0].keys is None:  # a band holds keys and values of its own blocks only
            continue
        keys, values = ([_pad(getattr(layer, name), width) for layer in layers] for name in ("keys", "values"))
        joined.update(torch.cat(keys), torch.cat(values), index)
    return joined


def _pad(tensor: Tensor, width: int) -> Tensor:
    """[1, heads, n, dim] -> [1, heads, width, dim] with zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
