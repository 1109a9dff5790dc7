"""A model spread over two pretended devices, driven through the engine; run by test_devices.py in a process of its own.

Nothing is computed: fake tensors have shapes, dtypes and devices only, and an operation on tensors of two devices fails
as it does on two GPUs. Numbers that the engine reads off a tensor are made up.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import random_artifacts, tiny_llava
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from safety.engine import Engine
from safety.lvlm import LVLM
from safety.settings import Lane, Revision, Sapt, Sasa

TOKEN = 5
READ = {getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "item", "is_nonzero")}
SPLIT = {"model.vision_tower": 0, "model.multi_modal_projector": 0, "model.language_model.embed_tokens": 0,
         "model.language_model.rotary_emb": 0, **{f"model.language_model.layers.{i}": int(i > 2) for i in range(6)},
         "model.language_model.norm": 1, "lm_head": 1}  # as accelerate's device map
LANES = [
    Lane("gated", sasa=Sasa(2, 4, threshold=0.1)),
    Lane("gate", sasa=Sasa(2, 4, threshold=1.0)),
    Lane("project", sasa=Sasa(2, 4, mode="project")),
    Lane("heads", revision=Revision(1, level="head", positions="all")),
    Lane("sapt", sapt=Sapt(0.0, 2)),
    Lane("all", Sasa(1, 3, mode="project"), Revision(4), Sapt(0.9, 2)),
]


class MadeUpNumbers(TorchDispatchMode):
    """What is read off a fake tensor: True, TOKEN or one half."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READ:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else TOKEN
        return func(*args, **(kwargs or {}))


def spread(lvlm: LVLM, mode: FakeTensorMode) -> LVLM:
    """The model on "gpu:0" and "gpu:1", with the hooks by which accelerate carries inputs to them."""
    for name, device in SPLIT.items():
        part = lvlm.model.get_submodule(name)
        for module in part.modules():
            for store in (module._parameters, module._buffers):
                for key, value in store.items():
                    if value is None:  # a linear layer without bias
                        continue
                    moved = mode.from_tensor(value.detach()).to(f"gpu:{device}")
                    store[key] = torch.nn.Parameter(moved, False) if store is module._parameters else moved
        hook = AlignDevicesHook(f"gpu:{device}", skip_keys=lvlm.model._skip_keys_device_placement)
        add_hook_to_module(part, hook)
    return LVLM("spread", lvlm.model, lvlm.processor)


def main() -> None:
    """Every lane, once until the length is reached and once with lanes that end early."""
    _setup_privateuseone_for_python_backend("gpu")
    lvlm, make = tiny_llava(), torch.tensor

    def tensor(data, device="cpu", **settings):
        """torch.tensor fills real memory; here it must not."""
        real = make(data, **settings)
        return torch.empty(real.shape, dtype=real.dtype, device=device)
    torch.tensor = tensor
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, MadeUpNumbers():
        lvlm = spread(lvlm, mode)
        assert {str(parameter.device) for parameter in lvlm.model.parameters()} == {"gpu:0", "gpu:1"}
        engine = Engine(lvlm, random_artifacts(lvlm))
        for ends in ((), (TOKEN,)):
            lvlm.eos_ids = frozenset(ends)
            steps = [step for step in engine.stream("Hi", lanes=LANES, max_new_tokens=3)]
            print(len(steps))


if __name__ == "__main__":
    main()
