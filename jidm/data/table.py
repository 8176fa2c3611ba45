"""Columns of parquet tables as NumPy arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.data.feature import Feature
from jidm.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MARK = b"jidm"
"""Key of the table's own notes: what makes an episode whole without any other file."""


def open_table(path: Path) -> pq.ParquetFile:
    """An open parquet file.

    Raises:
        DatasetError: it is absent or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DatasetError(f"{path}: this table is missing; copy the data set again, or take out what refers to it")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path}: not a readable parquet table ({_first_line(error)}); copy it again") from None


def read_columns(path: Path, keys: Sequence[str], episode: int | None = None) -> dict[str, Any]:
    """Some columns of a table as Arrow arrays.

    Args:
        episode: take only the rows of this episode, in their order; all rows if None.

    Raises:
        DatasetError: the table or a column is absent or damaged.
    """
    import pyarrow as pa

    with open_table(path) as file:
        present = file.schema_arrow.names
        absent = [key for key in keys if key not in present]
        if episode is not None and "episode_index" not in present:
            absent.append("episode_index")
        if absent:
            raise DatasetError(f"{path}: has no column '{absent[0]}' (it has {', '.join(present)}); record it again")
        try:
            if episode is None:
                table = file.read(columns=list(keys), use_threads=False)
            else:
                groups = _groups_with(file, episode)
                table = file.read_row_groups(groups, columns=[*keys, "episode_index"], use_threads=False)
                rows = np.flatnonzero(table.column("episode_index").to_numpy() == episode)
                if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
                    table = table.slice(rows[0], len(rows))
                else:
                    table = table.take(pa.array(rows))
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{path}: cannot be read ({_first_line(error)}); copy it again") from None
    return {key: pa.concat_arrays(table.column(key).chunks) if table.num_rows else _empty(table, key) for key in keys}


def to_numpy(array: Any, what: str) -> NDArray[Any]:
    """(T, ...) values of an Arrow array of numbers, text, or evenly nested lists of them; a missing number is NaN.

    Raises:
        DatasetError: lists of unequal length, or missing values that are not floating point.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise DatasetError(f"{what}: {array.null_count} frames hold nothing; record it again")
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


def to_arrow(values: NDArray[Any], feature: Feature) -> pa.Array:
    """The column of (T, *shape) values as LeRobot stores it: numbers plain, vectors of fixed size, grids nested."""
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


def write_table(path: Path, columns: Mapping[str, Any], notes: bytes | None = None) -> None:
    """Write Arrow columns; the same columns and notes give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(dict(columns))
    if notes is not None:
        table = table.replace_schema_metadata({MARK: notes})
    pq.write_table(table, path, compression="zstd")


def read_notes(path: Path) -> bytes | None:
    """What `write_table` was given as notes; None for other tables. Reads the footer only."""
    with open_table(path) as file:
        metadata = file.schema_arrow.metadata or {}
        return metadata.get(MARK)


def _groups_with(file: pq.ParquetFile, episode: int) -> list[int]:
    """Row groups that may hold rows of the episode, by their statistics where there are any."""
    meta = file.metadata
    column = [meta.schema.column(i).path for i in range(meta.num_columns)].index("episode_index")
    groups = []
    for k in range(meta.num_row_groups):
        stats = meta.row_group(k).column(column).statistics
        if stats is None or not stats.has_min_max or stats.min <= episode <= stats.max:
            groups.append(k)
    return groups


def _empty(table: Any, key: str) -> Any:
    import pyarrow as pa

    return pa.array([], type=table.schema.field(key).type)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
