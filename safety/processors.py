"""A model's processor, for pictures and text only."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


def read_processor(folder: Path, config: Any) -> Any:
    """The processor of a model folder, without its video part.

    Half of the families bring a video processor, which cannot even be loaded without torchvision; nothing here is ever
    a video, and torchvision has to be built for exactly the torch that is installed.

    Raises:
        ImportError: the processor needs a package that is not installed. Others: the folder's files are damaged.
    """
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return without_video(kind).from_pretrained(folder, trust_remote_code=False)


def without_video(kind: Any) -> Any:
    """A processor class like `kind` that does without its video processor."""
    class ImagesOnly(kind):  # type: ignore[misc]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM looks these up for pictures too

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *arguments: Any, **kwargs: Any) -> Any:
            """Make one of its parts; None takes the video processor's place."""
            args.insert(kind.get_attributes().index("video_processor"), None)
            return super().from_args_and_dict(args, *arguments, **kwargs)

        @classmethod
        def get_attributes(cls) -> list[str]:
            """What it is made of."""
            return [name for name in kind.get_attributes() if name != "video_processor"]
    ImagesOnly.__name__ = kind.__name__
    return ImagesOnly
