"""Checkpoints: orbax arrays together with everything needed to rebuild the model.

A checkpoint is a directory:

    arrays/         orbax: `variables`, and `training` if the caller gave any
    metadata.json   architecture, plan, preprocessing, class names, `info`
    manifest.json   SHA-256 of every other file

It appears under its name in one rename, whole or not at all. Orbax does not notice
flipped bits, so the hashes are written after its commit and checked on load.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inertia_jax.atomic import appearing, local_path
from inertia_jax.calls import ApplyFn
from inertia_jax.differences import differing_from
from inertia_jax.inputs import Shape
from inertia_jax.metadata import (
    Metadata,
    describe,
    find_checkpoint,
    load_description,
)
from inertia_jax.models.create import image_shape_of, known_name
from inertia_jax.variables import plain_variables


class CheckpointDamagedError(ValueError):
    """The error of a checkpoint whose files are not those that were written.

    Example:
        >>> import pathlib
        >>> ij.save_checkpoint("checkpoints/damaged", model, variables)
        >>> next(pathlib.Path("checkpoints/damaged").rglob("*ocdbt")).write_bytes(b"")
        0
        >>> try:
        ...     ij.load_checkpoint("checkpoints/damaged")
        ... except ij.CheckpointDamagedError:
        ...     print("a file was altered")
        a file was altered
    """


class CheckpointWriteError(OSError):
    """The error of a checkpoint that could not be written; nothing of it is left.

    Example:
        >>> import pathlib
        >>> pathlib.Path("a file").touch()
        >>> try:
        ...     ij.save_checkpoint("a file/checkpoint", model, variables)
        ... except ij.CheckpointWriteError:
        ...     print("nothing can be written there")
        nothing can be written there
    """


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    metadata: Metadata | None = None,
    training: Mapping[str, Any] | None = None,
    together: bool = False,
) -> None:
    """Writes a checkpoint; it appears at `path` whole or not at all.

    With several processes, either one process calls and writes everything, or all call
    with `together`. Then each writes its share of the arrays. When all have written,
    the first process commits: it writes the description and the hashes of all files,
    and gives the directory its name.

    Args:
        path: The directory to make.
        model: A network; its plan is stored. Of a model that `create_model` does not
            make, such as a `Planned`, the checkpoint has the name of the class, and
            `load_checkpoint` is given the model.
        variables: Its variables.
        metadata: The description to store beside the arrays.
        training: Nested dictionaries of arrays that training continues from.
        together: Whether all processes call. Each does so at its own time and from any
            thread, with the same arrays and a `path` on a file system that all share.

    Raises:
        FileExistsError: Something exists at `path`.
        ValueError: `model` is `Folded`, or no Linen model, or `path` is a URL.
        CheckpointWriteError: It could not be written, e.g. because the disk is full.

    Example:
        >>> about = ij.Metadata(class_names=tuple("0123456789"), info={"epoch": 3})
        >>> ij.save_checkpoint("checkpoints/lenet", model, variables, metadata=about)
        >>> ij.load_metadata("checkpoints/lenet").info["epoch"]
        3
    """
    path = local_path(path).absolute()
    if path.exists():
        raise FileExistsError(f"`path` (={path}) must not exist; it was left as it is.")
    description = describe(model, metadata or Metadata())
    tree = {"variables": plain_variables(variables), "training": training or {}}
    tree = jax.tree.map(np.asarray, tree)
    processes = range(jax.process_count()) if together else (jax.process_index(),)
    commits = jax.process_index() == processes[0]
    writer = "all" if together else None
    try:
        with appearing(path, writer=writer, commits=commits) as partial:
            if commits:
                partial.mkdir()
            if len(processes) > 1:
                tree = _on_each_process(tree)
            # Saving begins and ends with a barrier of the processes that write.
            with _checkpointer(*processes, name=path.name) as checkpointer:
                checkpointer.save(partial / "arrays", args=ocp.args.PyTreeSave(tree))
            if commits:
                (partial / "metadata.json").write_text(description)
                manifest = json.dumps(_hash_files(partial), indent=1)
                (partial / "manifest.json").write_text(manifest)
    # Tensorstore reports a full disk as ValueError or XlaRuntimeError, not as OSError.
    except Exception as error:
        raise _write_error(path, error) from error


def _write_error(path: pathlib.Path, error: Exception) -> CheckpointWriteError:
    """Returns the error of a checkpoint, in one line, and with the system's number."""
    found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    number = int(found[1]) if found else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).partition("\n")[0]
    wrapped = CheckpointWriteError(f"could not write {path}: {reason}")
    wrapped.errno = number
    return wrapped


def _on_each_process(tree: Any) -> Any:
    """Returns host arrays as global arrays, which orbax divides among the processes."""
    devices: dict[int, jax.Device] = {}
    for device in jax.devices():
        devices.setdefault(device.process_index, device)
    mesh = Mesh(np.array(list(devices.values())), ("process",))
    sharding = NamedSharding(mesh, PartitionSpec())
    mine = devices[jax.process_index()]

    def put(array: np.ndarray) -> jax.Array:
        copy = jax.device_put(array, mine)
        return jax.make_array_from_single_device_arrays(array.shape, sharding, [copy])

    return jax.tree.map(put, tree)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    image_shape: Shape | None = None,
    apply_fn: ApplyFn | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Checks every file of a checkpoint against its SHA-256, and reads the checkpoint.

    Args:
        path: The checkpoint, or a run, of which the best checkpoint is taken.
        model: The model, if the checkpoint has none of this library's networks; its
            plan is that of the checkpoint.
        image_shape: The shape of one input of `model`, such as [h, w, c], or of each of
            several by name. None: that of the checkpoint's preprocessing.
        apply_fn: How `model` is called, as in `compress`.

    Returns:
        (model, variables), ready for `model.apply(variables, images)`.

    Raises:
        FileNotFoundError: There is no checkpoint at `path`.
        CheckpointDamagedError: A file is missing, surplus or altered.
        OSError: A file could not be read.
        ValueError: `model` is missing, or its layers and arrays are not those of the
            checkpoint; the message says which.

    Example:
        >>> ij.save_checkpoint("checkpoints/again", model, variables)
        >>> again, arrays = ij.load_checkpoint("checkpoints/again")
        >>> again == model
        True
    """
    path = find_checkpoint(path)
    verify_checkpoint(path)
    make = None if model is None else lambda about, metadata: model
    found, metadata = load_description(path, make)
    if model is not None and (name := known_name(found)) is not None:
        raise ValueError(
            f"`model` (={type(model).__name__}) must be None: {path} has a {name} of "
            f"this library, which is made by itself."
        )
    variables = load_arrays(path)["variables"]
    if model is not None:
        known = metadata.preprocessing
        given = known.image_shape if image_shape is None and known else image_shape
        shape = image_shape_of(model, given)
        if differing := differing_from(found, variables, shape, apply_fn=apply_fn):
            raise ValueError(
                f"{path} is not of `model` (={type(model).__name__}): {differing}."
            )
    return found, variables


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `{"variables": ..., "training": ...}` as NumPy arrays, unverified."""
    path = local_path(path).absolute() / "arrays"
    with _checkpointer(jax.process_index(), name="read") as checkpointer:
        # Arrays go to host memory, since the devices that wrote may not exist here.
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                restore_args=jax.tree.map(lambda _: as_numpy, tree)
            ),
        )


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Checks every file of a checkpoint against its SHA-256.

    Raises:
        FileNotFoundError: There is no checkpoint at `path`.
        CheckpointDamagedError: A file is missing, surplus or altered; the message says
            which.
        OSError: A file could not be read, so that its content is unknown.
    """
    path = local_path(path)
    if not (path / "arrays").is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    # What is no file, such as a directory or a loop of links, is damage, and a pipe
    # would be waited for.
    if not (path / "manifest.json").is_file():
        raise CheckpointDamagedError(f"{path} is damaged: manifest.json is no file.")
    found = _hash_files(path)
    try:
        expected = json.loads((path / "manifest.json").read_bytes())
        differing = set(expected.items()) ^ set(found.items())
    except (RecursionError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointDamagedError(f"{path} is damaged: {error}.") from error
    if differing:
        files = sorted({name for name, _ in differing})
        raise CheckpointDamagedError(f"{path} is damaged: {', '.join(files):.500}.")


def _checkpointer(*processes: int, name: str) -> ocp.Checkpointer:
    # Only these processes wait for each other. Their barriers go through
    # `jax.distributed`, not through the devices, which training uses at the same time.
    options = ocp.options.MultiprocessingOptions(
        primary_host=processes[0],
        active_processes=set(processes),
        barrier_sync_key_prefix=f"{name}_{'_'.join(map(str, processes))}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _hash_files(path: pathlib.Path) -> dict[str, str]:
    hashes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / "manifest.json":
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            hashes[file.relative_to(path).as_posix()] = digest
    return hashes
