"""The answers of an evaluation on disk: append-only lines, so that a kill at any point loses at most the last batch.

One line is one answer: of one sample of one suite in one arm. Every line carries what determines the answer (model,
artifacts, settings, sample with its picture; as digests), so answers of other settings are never mixed in.
Several processes write one file each; together the files of a folder are the result.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from safety.errors import UserError

Key = tuple[str, str, str]  # suite, sample id, arm


def key_of(record: Mapping[str, Any]) -> Key:
    """Which answer a record holds."""
    return record["suite"], record["id"], record["arm"]


def text_of(record: Mapping[str, Any]) -> str:
    """The whole answer."""
    return "".join(record["tokens"])


def read_records(folder: Path) -> dict[Key, dict[str, Any]]:
    """All answers of a folder; of an answer that was given twice, the first that is not an error.

    A torn last line (the writer was killed) is left out; `Writer` removes it before it appends.

    Raises:
        UserError: a line in the middle of a file is damaged.
    """
    records: dict[Key, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        *lines, _torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if "error" in records.setdefault(key_of(record), record):
                    records[key_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"Line {number} of {path} is damaged. Delete the line, or the folder, and evaluate "
                                "again.") from error
    return records


class Writer:
    """Appends answers to one file; a context manager that holds the file's lock."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ("answers.jsonl" if process == 0 else f"answers-{process}.jsonl")
        self._lock = FileLock(f"{self.path}.lock")

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"Another evaluation is writing {self.path}. Wait for it or choose another --out."
                            ) from error
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)  # the torn line of a killed run
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._lock.release()  # the file stays: deleted, it would leave a waiting writer with a lock that nobody sees

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append a batch and wait until it is on the disk."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
