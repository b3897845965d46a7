"""Tensors in parts on the disk: each process writes its own, any number of processes reads them.

This is torch.distributed.checkpoint with files of safetensors. Its own files pickle their metadata,
and what is unpickled can run code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty


def save_parts(parts: Mapping[str, DTensor], folder: Path) -> None:
    """Write this process's parts; every process calls it, and it ends when all have written.

    What fails in one of them is an OSError in all.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(dict(parts), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(_failures(error)) from error


def load_parts(
    folder: Path, shapes: Mapping[str, Sequence[int]], mesh: DeviceMesh | None
) -> dict[str, DTensor]:
    """Return tensors of these shapes, parted along their first dimension over the mesh.

    Every process calls it. ValueError in all of them if there is no mesh, and unless the files hold
    each of the tensors as a whole.
    """
    if mesh is None:
        raise ValueError("expected a run without fsdp, got tensors in parts")
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    for name, shape in shapes.items():
        _check_whole(name, shape, found.get(name))
    parts = {
        name: empty(
            *shape, dtype=found[name].properties.dtype, device_mesh=mesh, placements=[Shard(0)]
        )
        for name, shape in shapes.items()
    }
    try:
        checkpoint.load(parts, storage_reader=reader)
    except CheckpointException as error:
        raise ValueError(_failures(error)) from error
    return parts


def _failures(error: CheckpointException) -> str:
    """Return what has failed in which process; the exception itself is no Exception."""
    return "; ".join(f"process {rank}: {failed!r}" for rank, (failed, _) in error.failures.items())


def _check_whole(name: str, shape: Sequence[int], found: TensorStorageMetadata | None) -> None:
    """Raise ValueError where a part is missing: it would be loaded as whatever the memory holds."""
    size = [] if found is None else list(found.size)
    rows = 0 if found is None else sum(chunk.sizes[0] for chunk in found.chunks)
    if size != list(shape) or rows != shape[0]:
        raise ValueError(f"expected all parts of {name} {list(shape)}, got {rows} rows of {size}")
