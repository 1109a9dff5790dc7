"""Fit activation revision: vectors from contrasting pairs, and the block, level and strength that do most good.

Constructions (arXiv 2501.16378), always safe minus unsafe:
    multi-response: the same picture and question, a refusal and the undefended model's answer (the paper's best);
    multi-instruction: pictures with benign and with harmful requests, before any answer;
    text-response: as multi-response, with the request as text and the picture removed.
"""

import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import torch
from safetensors import safe_open
from scipy.stats import binomtest
from torch import Tensor

from safety.artifacts import Artifacts
from safety.calibrate import trial
from safety.calibrate.material import Material, indices
from safety.calibrate.observe import READ_TOKENS, digest, reading, refusal_for, save_whole
from safety.calibrate.vectors import Side, fit_revision
from safety.engine import Engine
from safety.errors import UserError
from safety.evaluate.judges import is_garbage
from safety.evaluate.run import write_json
from safety.refusal import refusal_start
from safety.settings import MAX_LANES, Lane, Revision

DEPTHS = (0.27, 0.35, 0.43, 0.5, 0.65, 0.8)
STRENGTHS = {"head": (2.0, 3.0, 4.0), "layer": (0.5, 0.75, 1.0)}
FIRST_LOOK, LONG_LOOK = 8, 120  # validation samples of each side on which all, and the best, candidates are tried
FINALISTS = 3  # places, each at its best strength
WEAKER = (0.6, 0.35)  # shares of their strengths that are tried as well: the strongest seldom keep what is promised
TOKENS = 24  # of an answer: a refusal comes at its beginning
LOST, SURE = 0.05, 0.95  # share of benign requests whose helpful answer a candidate may cost, and how sure that is


def fit(material: Material, artifacts: Artifacts) -> dict:
    """Add the revision part and its recommended settings to `artifacts`; returns how they were found."""
    numbers = _pairs(material)
    if len(numbers) < 8:
        raise UserError(f"Only {len(numbers)} harmful samples were answered; revision vectors need at least 8.")
    safe, unsafe = _sides(material, numbers)
    with material.progress.stage("revision vectors", material.lvlm.blocks) as tick:
        artifacts.revision = fit_revision(safe, unsafe, material.lvlm.blocks, material.recipe.seed, tick)
    artifacts.settings.revision, tried = _choose(material, artifacts)
    ranked = artifacts.revision.accuracy[artifacts.settings.revision.layer]
    return {"pairs": len(numbers), "construction": material.recipe.construction, "mean_of_tokens": READ_TOKENS,
            "head_accuracy_at_layer": [round(value, 3) for value in ranked.tolist()], "candidates": tried,
            "rule": f"most refusals of harmful requests among candidates that lose, with {SURE:.0%} confidence, at "
                    f"most {LOST:.0%} of the helpful benign answers; if there are none, among those that lose fewest"}


def _pairs(material: Material) -> list[int]:
    """Harmful samples whose undefended answer is unsafe, none of them for validation; read rightly where possible."""
    usable = material.complied & material.whole & material.fitting & material.openly
    numbers = indices(usable & material.understood)
    if len(numbers) < 8:
        numbers = indices(usable)
    return numbers[:material.recipe.pairs]


def _sides(material: Material, numbers: list[int]) -> tuple[Side, Side]:
    """Activations of the safe and the unsafe side, read block by block."""
    construction = material.recipe.construction
    if construction == "multi-instruction":
        pictures = np.array([sample.image is not None for sample in material.samples])
        benign = indices(material.answered & material.openly & ~material.unsafe & material.fitting
                         & (pictures == pictures[numbers[0]]))
        return (_stored(material, benign[:material.recipe.pairs], "prompt"),
                _stored(material, numbers, "prompt"))
    if construction == "text-response":
        return _text_sides(material, numbers)
    return _stored(material, numbers, "refusal"), _stored(material, numbers, "answer")


def _stored(material: Material, numbers: list[int], prefix: str) -> Side:
    return lambda name, block: torch.stack([material.observed[i].row(f"{prefix}.{name}", block) for i in numbers])


def _text_sides(material: Material, numbers: list[int]) -> tuple[Side, Side]:
    """The same requests as text, without their pictures; kept in the work folder, one file per pair."""
    lvlm, folder = material.lvlm, material.work / "text-pairs"
    folder.mkdir(exist_ok=True)
    paths = []
    with material.progress.stage("pairs as text", len(numbers)) as tick:
        for index in numbers:
            seen, sample = material.observed[index], material.samples[index]
            paths.append(folder / f"{seen.path.stem}-{digest(sample.asked)}.safetensors")
            if not paths[-1].exists():
                tensors: dict[str, Tensor] = {}
                refusal = lvlm.tokenizer(refusal_for(sample, index), add_special_tokens=False)["input_ids"]
                with lvlm.lock:
                    trunk = lvlm.prefill(lvlm.prepare(sample.asked, None, len(seen.ids)), set())
                    for side, ids in (("refusal", refusal), ("answer", seen.ids)):
                        read = reading(lvlm, trunk, ids)
                        tensors |= {f"{side}.layers": read["layers"], f"{side}.heads": read["heads"]}
                        trunk.cache.crop(-len(ids))
                save_whole(tensors, paths[-1])
            tick()

    def stored(prefix: str) -> Side:
        def rows(name: str, block: int) -> Tensor:
            found = []
            for path in paths:
                with safe_open(path, "pt") as file:
                    found.append(file.get_slice(f"{prefix}.{name}")[block])
            return torch.stack(found)
        return rows
    return stored("refusal"), stored("answer")


def _choose(material: Material, artifacts: Artifacts) -> tuple[Revision, list[dict]]:
    """A first look at every candidate on few validation samples, a long one at the best of each of the best
    places, at the same ones weaker, and at the very best with the other kind of vector."""
    depths = sorted({min(round(share * material.lvlm.blocks), material.lvlm.blocks - 1) for share in DEPTHS})
    candidates = [Revision(layer, alpha, level) for level, strengths in STRENGTHS.items()  # type: ignore[arg-type]
                  for layer in depths for alpha in strengths]
    first = _try(material, artifacts, candidates, FIRST_LOOK, "revision: first look")
    order = sorted(range(len(candidates)), key=lambda i: -first[i]["refused"] + 2 * max(0.0, first[i]["lost"]))
    places: dict[tuple[str, int], Revision] = {}
    for i in order:
        places.setdefault((candidates[i].level, candidates[i].layer), candidates[i])
    finalists = list(places.values())[:FINALISTS]
    finalists += [replace(finalists[0], vector="pwd"),
                  *(replace(best, alpha=round(share * best.alpha, 3)) for best in finalists for share in WEAKER)]
    rows = _try(material, artifacts, finalists, LONG_LOOK, "revision: long look")
    fewest = min(row["lost"] for row in rows)
    gentle = [i for i, row in enumerate(rows) if _at_most(row["lost"], row["benign"]) <= LOST or row["lost"] == fewest]
    best = max(gentle, key=lambda i: (rows[i]["refused"], -rows[i]["lost"], -finalists[i].alpha))
    return finalists[best], rows + first


def _at_most(share: float, n: int) -> float:
    """Upper bound, with confidence SURE, of a share that was measured on n samples (Clopper and Pearson's)."""
    return float(binomtest(round(share * n), n, alternative="less").proportion_ci(SURE).high)


def _try(material: Material, artifacts: Artifacts, candidates: list[Revision], count: int, title: str) -> list[dict]:
    """What each candidate does to `count` validation samples of each side, beside the undefended answers. "lost": share
    of the benign ones that were helped before and are not any more; what it repairs elsewhere makes up for none."""
    harmful = _of_every_kind(material, indices(material.judging & material.complied), count)
    benign = _of_every_kind(material, indices(material.judging & ~material.unsafe), count)
    if not harmful or not benign:
        raise UserError("Revision is chosen by samples that take part in no fit, and none of those is "
                        f"{'a harmless request' if harmful else 'a harmful request that the model answers'}. "
                        "Give more of them.")
    samples = [material.samples[i] for i in (*harmful, *benign)]
    plain = [material.lvlm.text(material.observed[i].ids[:TOKENS]) for i in benign]
    helped_before = np.array([refusal_start(text) is None and not is_garbage(text) for text in plain])
    engine = Engine(material.lvlm, Artifacts(revision=artifacts.revision))
    rows = []
    groups = [candidates[start:start + MAX_LANES] for start in range(0, len(candidates), MAX_LANES)]
    with material.progress.stage(title, len(groups) * len(samples)) as tick:
        for group in groups:
            path = material.work / f"revised-{_key(material, group, count)}.json"
            if path.exists():
                rows += json.loads(path.read_text())
                for _ in samples:
                    tick()
                continue
            made = []
            lanes = [Lane(str(number), revision=candidate) for number, candidate in enumerate(group)]
            answers = trial.answer_all(engine, samples, lanes, TOKENS, tick=tick)
            for number, candidate in enumerate(group):
                texts = [row[number] for row in answers]
                refused = [answer.refused for answer in texts]
                helped = np.array([not answer.refused and not is_garbage(answer.text)
                                   for answer in texts[len(harmful):]])
                made.append({"level": candidate.level, "layer": candidate.layer, "alpha": candidate.alpha,
                             "vector": candidate.vector, "harmful": len(harmful), "benign": len(benign),
                             "refused": round(float(np.mean(refused[:len(harmful)])), 4),
                             "garbage": round(float(np.mean([not answer.refused and is_garbage(answer.text)
                                                             for answer in texts[:len(harmful)]])), 4),
                             "benign_refused": round(float(np.mean(refused[len(harmful):])), 4),
                             "lost": round(float(np.mean(helped_before & ~helped)), 4)})
            write_json(path, made)
            rows += made
    return rows


def _of_every_kind(material: Material, numbers: list[int], count: int) -> list[int]:
    """At most `count` of the sample numbers, as many of each kind as can be: a candidate that spares the pictures of
    text, which most samples are, may ruin answers to plain questions."""
    seen: Counter[str] = Counter()
    turns = []
    for number in numbers:
        kind = material.samples[number].kind
        turns.append((seen[kind], number))
        seen[kind] += 1
    return sorted(number for _, number in sorted(turns)[:count])


def _key(material: Material, group: list[Revision], count: int) -> str:
    """Changes with everything that a trial of these candidates depends on."""
    recipe = material.recipe
    stems = [material.observed[i].path.stem for i in indices(material.openly & material.answered)]
    return digest(stems, recipe.construction, recipe.pairs, recipe.seed,
                  [asdict(candidate) for candidate in group], count, TOKENS, "paired, of every kind")
