"""The methods, slow and obvious: no cache, no batch, one whole forward pass (or two) per token, one lane at a time.

Every pass runs the whole model on the request's own tensors. What follows the prompt, generated tokens and soft
prompts, takes part as placeholder tokens whose embeddings are put in place right before the decoder.
"""

import torch
from torch import Tensor

from safety.artifacts import Artifacts
from safety.lvlm import LVLM
from safety.parts import RevisionArtifact
from safety.reading import ALOUD_TOKENS, READ_ALOUD, words_read
from safety.settings import Lane, Revision


def added_by(revision: Revision, part: RevisionArtifact) -> Tensor:
    """What revision adds to a block's output, or to the heads' outputs in a row: alpha times safe minus unsafe."""
    kind = f"{revision.level}_{revision.vector}"
    if revision.level == "layer":
        vector = part.vectors[kind][revision.layer]
        if revision.units == "std":
            vector = part.scales[kind][revision.layer] * vector / vector.norm()
        return revision.alpha * vector
    accuracy = part.accuracy[revision.layer].tolist()
    heads = sorted(range(len(accuracy)), key=lambda head: -accuracy[head])
    if revision.heads == "random":
        heads = torch.randperm(len(accuracy), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for head in range(len(accuracy)):
        vector = part.vectors[kind][revision.layer, head]
        if revision.units == "std":
            vector = part.scales[kind][revision.layer, head] * vector / vector.norm()
        rows.append(revision.alpha * vector if head in heads[:round(revision.fraction * len(heads))] else 0 * vector)
    return torch.cat(rows)


class Oracle:
    """Answers one prompt in one lane. After `run`: `tokens`, `checks` [(index, probability)], `gate`, `harm`."""

    def __init__(self, lvlm: LVLM, artifacts: Artifacts, prompt: str, image=None) -> None:
        self.lvlm, self.artifacts, self.prompt, self.image = lvlm, artifacts, prompt, image
        self.inputs = lvlm.prepare(prompt, image, 0)
        self.length = self.inputs["input_ids"].shape[1]

    def forward(self, tail: list[Tensor]) -> Tensor:
        """Post-norm states [1, n, width] of the prompt followed by these embeddings [1, m, width]."""
        count = sum(part.shape[1] for part in tail)

        def place(module, args, kwargs):
            embeds = kwargs["inputs_embeds"].clone()
            if count:
                embeds[:, -count:] = torch.cat(tail, 1)
            return args, {**kwargs, "inputs_embeds": embeds}
        hook = self.lvlm.decoder.register_forward_pre_hook(place, with_kwargs=True)
        try:
            inputs = append_ids(self.inputs, [50] * count)
            return self.lvlm.model.base_model(**inputs, use_cache=False).last_hidden_state
        finally:
            hook.remove()

    @torch.no_grad()
    def states(self, tail: list[Tensor], lane: Lane, revise: bool, steer: bool) -> Tensor:
        """Post-norm states [1, n, width] of a whole sequence, edited as the lane's settings say."""
        layers, revision, sasa = self.lvlm.layers, lane.revision, lane.sasa
        handles = []
        if revise and revision:
            first = 0 if revision.positions == "all" else self.length - 1
            added = added_by(revision, self.artifacts.revision).to(self.lvlm.device)

            def edit(x: Tensor) -> Tensor:
                x = x.clone()
                x[:, first:] += added
                return x
            if revision.level == "layer":
                handles.append(layers[revision.layer].register_forward_hook(lambda m, a, out: edit(out)))
            else:
                handles.append(layers[revision.layer].self_attn.o_proj.register_forward_pre_hook(
                    lambda m, a: (edit(a[0]),)))
        try:
            if steer:
                seen = {}
                taps = [layers[i].register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out.clone()))
                        for i in (sasa.safety_layer, sasa.fused_layer)]
                self.forward(tail)
                for tap in taps:
                    tap.remove()
                s, f = seen[sasa.safety_layer], seen[sasa.fused_layer]
                a = (s * f).sum(-1, keepdim=True) / ((f * f).sum(-1, keepdim=True) + 1e-6)
                mixed = (1 - sasa.strength) * s + sasa.strength * a * f
                handles.append(layers[sasa.safety_layer].register_forward_hook(lambda m, a, out: mixed))
            return self.forward(tail)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def read(self) -> Tensor:
        """[4 * width] for SASA's mode "reading": the last state of the request, and, as text, of what its picture
        says, of the prompt, and of that above the prompt."""
        state = words = prompt = both = self.forward([])[0, -1]
        self.words = ""
        if self.image is not None:
            look = Oracle(self.lvlm, self.artifacts, READ_ALOUD, self.image).run(Lane("look"), ALOUD_TOKENS, [])
            said = [token for token in look.tokens if token not in self.lvlm.eos_ids]
            self.words = words_read(self.lvlm.text(said), self.lvlm.markers)
            prompt = words = both = Oracle(self.lvlm, self.artifacts, self.prompt).forward([])[0, -1]
            if self.words:
                words, both = (Oracle(self.lvlm, self.artifacts, text).forward([])[0, -1]
                               for text in (self.words, f"{self.words}\n{self.prompt}"))
        return torch.cat([state, words, prompt, both])

    @torch.no_grad()
    def run(self, lane: Lane, steps: int, refusal: list[int]) -> "Oracle":
        """Generate greedily, at most `steps` tokens; an end token ends the answer."""
        self.tokens, self.checks, self.harm, self.gate = [], [], [], None
        if lane.sasa and lane.sasa.mode == "reading":
            state, probe = self.read(), self.artifacts.sasa.reading
            self.gate = torch.sigmoid(state @ probe.weight + probe.bias).item()
        elif lane.sasa and lane.sasa.mode != "project":
            probe = (self.artifacts.sasa.clean if lane.sasa.mode == "probe"
                     else self.artifacts.sasa.probes[lane.sasa.safety_layer, lane.sasa.fused_layer])
            state = self.states([], lane, revise=False, steer=lane.sasa.mode == "gate")[0, -1]
            self.gate = torch.sigmoid(self.lvlm.lm_head(state) @ probe.weight + probe.bias).item()
        if self.gate is not None and self.gate >= lane.sasa.threshold:
            self.tokens = refusal[:steps]
            return self
        steer = lane.sasa is not None and lane.sasa.mode == "project"
        soft = self.artifacts.sapt.soft[None]
        parts, injected = [], False
        while len(self.tokens) < steps:
            index = len(self.tokens)

            def last(*more: Tensor) -> Tensor:
                return self.states([*parts, *more], lane, True, steer)[0, -1]

            def check(index: int = index) -> bool:
                detector = self.artifacts.sapt.detectors[lane.sapt.detector]
                state = last(soft)
                p = torch.sigmoid(state @ detector.weight + detector.bias).item()
                self.checks.append((index, p))
                return p >= lane.sapt.threshold
            checked = False
            if lane.sapt and not injected and index % lane.sapt.interval == lane.sapt.interval - 1:
                injected, checked = check(), True
                if injected:
                    parts.append(soft)
            state = last()
            token = int(self.lvlm.lm_head(state).argmax())
            if token in self.lvlm.eos_ids and lane.sapt and lane.sapt.end_check and not injected and not checked:
                injected = check()
                if injected:
                    parts.append(soft)
                    state = last()
                    token = int(self.lvlm.lm_head(state).argmax())
            trace = self.artifacts.trace.probe
            self.harm.append(torch.sigmoid(state @ trace.weight + trace.bias).item())
            self.tokens.append(token)
            if token in self.lvlm.eos_ids:
                break
            parts.append(self.lvlm.embed(torch.tensor([[token]], device=self.lvlm.device)))
        return self


def append_ids(inputs: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """The same inputs with text tokens behind the prompt; per-token tensors other than masks get zeros."""
    if not ids:
        return inputs
    prompt = inputs["input_ids"]
    more = torch.tensor([ids], device=prompt.device)
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    return {name: torch.cat([tensor, fill.get(name, torch.zeros_like(more)).to(tensor.dtype)], 1)
            if tensor.shape == prompt.shape else tensor for name, tensor in inputs.items()}
