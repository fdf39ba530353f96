"""The claim of a pipeline on a directory."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from train.errors import UsageError, user_input
from train.experiments.pipeline_config import Pipeline
from train.run.directory import is_empty_directory, read_json, write_whole


def _describe(pipeline: Pipeline) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(pipeline)))


def _hash_weights(weights: str) -> str:
    with user_input(), pathlib.Path(weights).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_claim(pipeline: Pipeline, weights: str | None, workdir: pathlib.Path) -> None:
    """Checks that the directory is free, or holds this pipeline and these weights."""
    file = workdir / "pipeline.json"
    if not file.is_file():
        if workdir.exists() and not is_empty_directory(workdir):
            raise UsageError(
                f"{workdir} exists and holds no pipeline; nothing was changed."
            )
        return
    record = read_json(file)
    if not isinstance(record, dict):
        raise UsageError(f"{file} holds no pipeline; nothing was changed.")
    known = record.pop("weights_sha256", None)
    if record != _describe(pipeline):
        raise UsageError(
            f"{workdir} holds a pipeline with other settings; nothing was changed. "
            f"Give another --workdir."
        )
    if weights is None or known is None:
        return
    if not pathlib.Path(weights).expanduser().is_file():
        print(f"{weights} is not there any more; what was read of it before is used.")
    elif known != _hash_weights(weights):
        raise UsageError(
            f"{workdir} holds a pipeline of other weights than {weights}; nothing was "
            f"changed. Give another --workdir."
        )


def claim(pipeline: Pipeline, weights: str | None, workdir: pathlib.Path) -> None:
    """Writes into the directory which pipeline and which weights it belongs to."""
    record = _describe(pipeline)
    if weights is not None:
        record["weights_sha256"] = _hash_weights(weights)
    with user_input():
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "pipeline.json", json.dumps(record, indent=1) + "\n")
