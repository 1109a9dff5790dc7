"""Where the rows of published data sets come from: files as their authors publish them, and the Hugging Face Hub.

The Hub, and folders of parquet files, need the package `datasets` (requirements-eval.txt).
"""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety.errors import UserError
from safety.samples import Sample

CACHE = Path("build") / "benchmarks"  # pictures that come inside tables, and archives from the Hub, are kept here


@dataclass(frozen=True)
class Table:
    """Rows and how one becomes a sample; only the rows that are drawn are converted (and their pictures saved)."""

    rows: Sequence[Any]
    sample: Callable[[int, Any], Sample]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        ValueError: it is not one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"{path.name} is not a CSV file: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def from_parquet(folder: Path, pattern: str) -> Any:
    """The rows of all files of this pattern, as a `datasets.Dataset`: large tables are published in several parts.

    Raises:
        UserError: there is no such file, or `datasets` is not installed.
    """
    files = sorted(map(str, folder.rglob(pattern)))
    if not files:
        raise UserError(f"There is no file {pattern} in {folder}.")
    return _datasets().load_dataset("parquet", data_files=files, split="train")


def from_hub(repository: str, config: str | None, split: str) -> Any:
    """One split of a data set on the Hub, as a `datasets.Dataset`.

    Raises:
        UserError: `datasets` is not installed.
    """
    return _datasets().load_dataset(repository, config, split=split)


def unpacked_from_hub(repository: str, split: str) -> Path:
    """The folder that {split}.json and the unpacked {split}.zip of a data set on the Hub lie in; fetched once."""
    from huggingface_hub import hf_hub_download
    folder = CACHE / repository.split("/")[-1].lower()
    if not (folder / f"{split}.json").exists():
        archive = hf_hub_download(repository, f"{split}.zip", repo_type="dataset")
        index = hf_hub_download(repository, f"{split}.json", repo_type="dataset")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        (folder / f"{split}.json").write_bytes(Path(index).read_bytes())  # last: it says that all is there
    return folder


def keep(image: Any, name: str) -> str | None:
    """Keep a decoded picture as a file; its path. None, where there is no picture, stays None.

    The picture is part of the file's name: two folders of one benchmark number their rows alike.
    """
    if image is None:
        return None
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    path = CACHE / f"{name}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return str(path)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Benchmarks from the Hub or in parquet files need the package datasets: "
                        "pip install -r requirements-eval.txt.") from error
    return datasets
