"""Messages as openpi writes them: msgpack, with NumPy arrays as small maps of bytes, dtype and shape.

Whoever can reach a port can send anything, so nothing of a message is believed: how many objects it holds and how deep they
lie is counted before one is made, arrays are plain numbers whose size is that of their bytes, and there are no other types.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError

_ARRAY, _SCALARS = "__ndarray__", ("__npgeneric__", "__npscalar__")  # VERA calls scalars by the second name
_PLAIN_DTYPE = re.compile(r"[<>|=]?[biuf](1|2|4|8)")


@dataclass(frozen=True)
class MessageLimits:
    """What a message may hold.

    Attributes:
        size: bytes, arrays included. objects: values, keys included. depth: of maps and lists in each other.
        ndim: axes of an array.
    """

    size: int = 32 * 2**20
    objects: int = 10_000
    depth: int = 16
    ndim: int = 6


def pack(message: Any) -> bytes:
    """A message of maps, lists, strings, bytes, numbers, None and arrays as bytes.

    Raises:
        InputError: it holds anything else, arrays of objects, structures or complex numbers included.
    """
    import msgpack

    try:
        return bytes(msgpack.packb(message, default=_encode_array))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"cannot be sent: {error}") from None


def unpack(data: bytes | str, limits: MessageLimits | None = None) -> Any:
    """What `pack` packed, or openpi's client, or VERA's. Arrays are read-only.

    Raises:
        InputError: it is no such message, or exceeds the limits.
    """
    import msgpack

    allowed = limits or MessageLimits()
    if isinstance(data, str):
        raise InputError("a message is bytes, this is text")
    if len(data) > allowed.size:
        raise InputError(f"a message of {len(data)} bytes; the largest allowed has {allowed.size}")
    _check_structure(data, allowed)
    try:
        return msgpack.unpackb(
            data, object_hook=lambda fields: _decode_map(fields, allowed), ext_hook=_reject_extension, strict_map_key=True,
            max_str_len=allowed.size, max_bin_len=allowed.size,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # msgpack raises many kinds, and what it raises is the sender's doing
        raise InputError(f"not a message: {type(error).__name__}") from None


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _encode_array(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"an array of dtype {value.dtype}; only numbers and bools are sent")
        if isinstance(value, np.ndarray):
            fields = {b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
            return {_ARRAY.encode(): True, **fields}
        return {_SCALARS[0].encode(): True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a value of type {type(value).__name__}")


def _decode_map(fields: dict[Any, Any], limits: MessageLimits) -> Any:
    if _field(fields, _ARRAY) is not None:
        return _array(fields, limits)
    for name in _SCALARS:
        if _field(fields, name) is not None:
            number = _field(fields, "data")
            if not isinstance(number, (bool, int, float)):
                raise InputError("a scalar that is no number")
            with np.errstate(all="ignore"):
                try:
                    return _dtype(fields).type(number)
                except OverflowError:
                    raise InputError("a scalar beyond its dtype") from None
    return fields


def _array(fields: dict[Any, Any], limits: MessageLimits) -> NDArray[Any]:
    dtype, data, shape = _dtype(fields), _field(fields, "data"), _field(fields, "shape")
    if not isinstance(data, bytes):
        raise InputError("an array without bytes")
    if not isinstance(shape, (list, tuple)) or len(shape) > limits.ndim:
        raise InputError(f"an array whose shape is not up to {limits.ndim} numbers")
    count = 1
    for length in shape:
        if type(length) is not int or not 0 <= length <= limits.size:
            raise InputError("an array whose shape is not whole numbers")
        count *= length
    if count * dtype.itemsize != len(data):
        raise InputError(f"an array of shape {list(shape)} and dtype {dtype} in {len(data)} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


def _dtype(fields: dict[Any, Any]) -> np.dtype[Any]:
    name = _field(fields, "dtype")
    if not isinstance(name, str) or not _PLAIN_DTYPE.fullmatch(name) or name.lstrip("<>|=") in ("b2", "b4", "b8", "f1"):
        raise InputError("an array whose dtype is not a plain number (kinds b, i, u, f)")
    return np.dtype(name)


def _field(fields: dict[Any, Any], name: str) -> Any:
    """openpi's names are bytes; other packers make strings of them."""
    return fields.get(name.encode(), fields.get(name))


def _reject_extension(code: int, data: bytes) -> Any:
    raise InputError("a message with an extension type")


# ---- counting before anything is made --------------------------------------------------------------------------------

# What follows a first byte: (bytes of a length, bytes of fixed payload); lengths are of payloads, or of items.
_FIXED = {
    0xC0: 0,
    0xC2: 0,
    0xC3: 0,
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS, _MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
_LENGTH = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}


def _check_structure(data: bytes, limits: MessageLimits) -> None:
    """Walk over a message without making any of it (the msgpack specification, github.com/msgpack/msgpack).

    Raises:
        InputError: it ends too early or late, holds more objects or deeper ones than allowed, or an extension type.
    """
    position, seen, open_items = 0, 0, [1]  # items that are still to come, level by level
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        seen += 1
        if seen > limits.objects:
            raise InputError(f"a message of more than {limits.objects} values")
        if position >= len(data):
            raise InputError("a message that ends too early")
        kind = data[position]
        position += 1
        items = None
        if kind <= 0x7F or kind >= 0xE0:
            continue
        if 0x80 <= kind <= 0x8F:
            items = 2 * (kind & 0x0F)
        elif 0x90 <= kind <= 0x9F:
            items = kind & 0x0F
        elif 0xA0 <= kind <= 0xBF:
            position += kind & 0x1F
        elif kind in _FIXED:
            position += _FIXED[kind]
        else:
            width = _SIZED.get(kind) or _LISTS.get(kind) or _MAPS.get(kind)
            if width is None:
                raise InputError("a message with an extension type")
            if position + width > len(data):
                raise InputError("a message that ends too early")
            length = _LENGTH[width].unpack_from(data, position)[0]
            position += width
            if kind in _SIZED:
                position += length
            else:
                items = length * (2 if kind in _MAPS else 1)
        if items is not None:
            if seen + items > limits.objects:
                raise InputError(f"a message of more than {limits.objects} values")
            if len(open_items) > limits.depth:
                raise InputError(f"a message nested more than {limits.depth} deep")
            open_items.append(items)
    if position != len(data):
        raise InputError(
            "a message that ends too early" if position > len(data) else "a message with something behind it"
        )
