"""Columns of parquet tables as NumPy arrays, and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.datasets.feature import Feature
from jidm.errors import DatasetError, first_line
from jidm.git_lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CACHE_BYTES = 256 * 2**20
"""Size of the cache of columns from one part of a shared file; one column is cached at any size."""

RECORD_KEY = b"jidm"
"""Key of the episode's record in the metadata of the table's schema; with it a table describes itself."""


def open_table(path: Path, metadata: Any = None) -> pq.ParquetFile:
    """An open parquet file; `metadata` is its footer, if that was read before.

    Raises:
        DatasetError: it is absent, damaged or a git-LFS pointer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DatasetError(f"{path}: this table is missing; copy the data set again, or remove the references to it")
    refuse_lfs_pointer(path, DatasetError)
    try:
        return pq.ParquetFile(path, metadata=metadata)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path}: not a readable parquet table ({first_line(error)}); copy it again") from None


def read_columns(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Some columns of a table as Arrow arrays.

    Raises:
        DatasetError: the table or a column is absent or damaged.
    """
    with open_table(path) as file:
        table = _read_table(path, file, range(file.num_row_groups), keys)
    return {key: _one_array(table, key) for key in keys}


def column_names(path: Path) -> tuple[str, ...]:
    """Names of a table's columns. Reads the footer only.

    Raises:
        DatasetError: the table is absent or damaged.
    """
    with open_table(path) as file:
        return tuple(file.schema_arrow.names)


class SharedTableReader:
    """Columns of single episodes from tables of many.

    The footer and the rows read last are cached, because they often contain the next episode: some recorders write all
    episodes into one row group, which cannot be read in part.
    """

    def __init__(self) -> None:
        self._footer: tuple[Any, Any, list[tuple[int, int]]] | None = None
        self._cache: dict[Any, Any] = {}

    def column(self, path: Path, key: str, episode: int) -> Any:
        """The rows of one episode as an Arrow array, in their order.

        Raises:
            DatasetError: the table or the column is absent or damaged.
        """
        import pyarrow as pa

        file_id, metadata, ranges = self._read_footer(path)
        groups = tuple(k for k, (low, high) in enumerate(ranges) if low <= episode <= high)
        cache_key = (file_id, groups, key)
        if cache_key not in self._cache:
            with open_table(path, metadata) as file:
                table = _read_table(path, file, groups, [key, "episode_index"])
            kept = {k: x for k, x in self._cache.items() if k[:2] == cache_key[:2]}
            fits = sum(x.nbytes for x in kept.values()) + table.nbytes <= _CACHE_BYTES
            self._cache = {**(kept if fits else {}), cache_key: table}
        table = self._cache[cache_key]
        rows = np.flatnonzero(table.column("episode_index").to_numpy() == episode)
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return _one_array(table.slice(rows[0], len(rows)), key)
        return _one_array(table.take(pa.array(rows)), key)

    def _read_footer(self, path: Path) -> tuple[Any, Any, list[tuple[int, int]]]:
        """An identity of the file (path, time, size), its footer, and the minimum and maximum episode per row group."""
        if not path.is_file():
            open_table(path)
        file_id = (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        if self._footer is None or self._footer[0] != file_id:
            with open_table(path) as file:
                _require_columns(path, file, ["episode_index"])
                self._footer = (file_id, file.metadata, _episode_ranges(file.metadata))
        return self._footer


def to_numpy(array: Any, what: str) -> NDArray[Any]:
    """(T, ...) values of an Arrow array of numbers, text, or evenly nested lists of them; missing floats are NaN.

    Raises:
        DatasetError: lists of unequal length, or missing values that are not floating point.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    shape, array = [len(array)], plain_array(array)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise DatasetError(f"{what}: {array.null_count} frames are empty; record it again")
        if pa.types.is_fixed_size_list(array.type):
            shape.append(array.type.list_size)
        else:
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            if len(lengths) and lengths.min() != lengths.max():
                raise DatasetError(f"{what}: has between {lengths.min()} and {lengths.max()} entries; record it again")
            shape.append(int(lengths[0]) if len(lengths) else 0)
        array = array.flatten()
    if array.null_count and not pa.types.is_floating(array.type):
        raise DatasetError(f"{what}: {array.null_count} values are missing; record it again")
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.reshape(shape)


def plain_array(array: Any) -> Any:
    """An Arrow array without extension type; grids of LeRobot's writer have one if the package that registers it is loaded."""
    import pyarrow as pa

    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array


def to_arrow(values: NDArray[Any], feature: Feature) -> pa.Array:
    """(T, *shape) values as a column in LeRobot's form: plain numbers, vectors of fixed size, nested grids."""
    import pyarrow as pa

    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    if feature.shape == (1,):
        return array
    if len(feature.shape) == 1:
        return pa.FixedSizeListArray.from_arrays(array, feature.shape[0])
    for size in reversed(feature.shape):
        offsets = np.arange(0, len(array) + 1, size, dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array


def write_table(path: Path, columns: Mapping[str, Any], record: bytes, images: Sequence[str] = ()) -> None:
    """Write Arrow columns and the episode's record; the same arguments give the same bytes.

    Args:
        path: the file.
        columns: key -> Arrow array.
        record: of the episode.
        images: columns of stored images; `datasets` of Hugging Face decodes them by this entry of the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {RECORD_KEY: record}
    if images:
        features = {key: {"_type": "Image"} for key in images}
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    table = pa.table(dict(columns)).replace_schema_metadata(metadata)
    pq.write_table(table, path, compression="zstd")


def read_record(path: Path) -> bytes | None:
    """The record of a table from `write_table`; None for other tables. Reads the footer only."""
    with open_table(path) as file:
        metadata = file.schema_arrow.metadata or {}
        return metadata.get(RECORD_KEY)


def _read_table(path: Path, file: pq.ParquetFile, groups: Sequence[int], keys: Sequence[str]) -> pa.Table:
    """Columns of some row groups."""
    import pyarrow as pa

    _require_columns(path, file, keys)
    try:
        return file.read_row_groups(list(groups), columns=list(keys), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path}: cannot be read ({first_line(error)}); copy it again") from None


def _require_columns(path: Path, file: pq.ParquetFile, keys: Sequence[str]) -> None:
    present = file.schema_arrow.names
    for key in keys:
        if key not in present:
            raise DatasetError(f"{path}: has no column '{key}' (it has {', '.join(present)}); record it again")


def _episode_ranges(metadata: pq.FileMetaData) -> list[tuple[int, int]]:
    """Minimum and maximum episode of each row group; all episodes where the file has no statistics."""
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("episode_index")
    ranges = []
    for k in range(metadata.num_row_groups):
        stats = metadata.row_group(k).column(column).statistics
        known = stats is not None and stats.has_min_max
        ranges.append((stats.min, stats.max) if known else (0, sys.maxsize))
    return ranges


def _one_array(table: pa.Table, key: str) -> Any:
    import pyarrow as pa

    chunks = table.column(key).chunks
    return pa.concat_arrays(chunks) if chunks else pa.array([], type=table.schema.field(key).type)
