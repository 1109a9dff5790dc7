"""What the model's inside looks like while it reads a request and a given answer: one forward pass per sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from safety.inputs import open_image
from safety.lvlm import LVLM, hooks


@dataclass(frozen=True)
class Features:
    """fp32 on the CPU.

    Attributes:
        layers: [blocks, width] block outputs at the last position.
        heads: [blocks, heads, head_dim] inputs of the attention output projections at the last position.
        states: [m, width] post-norm states from which the answer's m tokens are chosen ([1, width]: no answer; the
            state from which its first token would be).
    """

    layers: Tensor
    heads: Tensor
    states: Tensor


@torch.inference_mode()
def read(lvlm: LVLM, prompt: str, image: str | None, answer: str | None) -> Features:
    """Run the request, followed by `answer` if there is one, through the undefended model."""
    ids = lvlm.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    inputs = lvlm.prepare(prompt, open_image(image) if image else None, len(ids))
    length = inputs["input_ids"].shape[1]
    inputs = append_ids(inputs, ids)
    layers: list[Tensor] = []
    heads: list[Tensor] = []
    with hooks() as add:
        for block in range(lvlm.blocks):
            add(lvlm.layers[block].register_forward_hook(lambda m, a, out: layers.append(out[0, -1].float().cpu())))
            add(lvlm.attention_output(block).register_forward_pre_hook(
                lambda m, a: heads.append(a[0][0, -1].float().cpu())))
        output = lvlm.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    states = output[length - 1:max(output.shape[0] - 1, length)].float().cpu()
    return Features(torch.stack(layers), torch.stack(heads).unflatten(1, (lvlm.heads, lvlm.head_dim)), states)


def append_ids(inputs: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """The same inputs with text tokens behind the prompt; per-token tensors other than masks get zeros."""
    if not ids:
        return inputs
    prompt = inputs["input_ids"]
    more = torch.tensor([ids], device=prompt.device)
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    return {name: torch.cat([tensor, fill.get(name, torch.zeros_like(more)).to(tensor.dtype)], 1)
            if tensor.shape == prompt.shape else tensor for name, tensor in inputs.items()}
