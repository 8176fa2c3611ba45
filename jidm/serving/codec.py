"""openpi's message format: msgpack, with NumPy arrays as maps of bytes, dtype and shape.

Messages are untrusted. `check_structure` bounds the number and nesting of values before any is created; arrays hold plain
numbers, and their size must match their bytes; no other types are allowed.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.serving.message_check import MessageLimits, check_structure

_ARRAY, _SCALARS = "__ndarray__", ("__npgeneric__", "__npscalar__")  # VERA uses the second name for scalars
_PLAIN_DTYPE = re.compile(r"[<>|=]?[biuf](1|2|4|8)")


def pack(message: Any) -> bytes:
    """Encode a message of maps, lists, strings, bytes, numbers, None and arrays.

    Raises:
        InputError: it holds any other type, such as an array of objects, structures or complex numbers.
    """
    import msgpack

    try:
        return bytes(msgpack.packb(message, default=_encode_array))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"cannot be sent: {error}") from None


def unpack(data: bytes | str, limits: MessageLimits | None = None) -> Any:
    """Decode a message from `pack`, from openpi's client or from VERA's. Arrays are read-only.

    Raises:
        InputError: it is not such a message, or exceeds the limits.
    """
    import msgpack

    allowed = limits or MessageLimits()
    if isinstance(data, str):
        raise InputError("a message must be bytes, this is text")
    check_structure(data, allowed)
    try:
        return msgpack.unpackb(
            data, object_hook=lambda fields: _decode_map(fields, allowed), ext_hook=_reject_extension, strict_map_key=True,
            max_str_len=allowed.size, max_bin_len=allowed.size,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # msgpack raises many types; all of them are the sender's fault
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
                raise InputError("a scalar that is not a number")
            with np.errstate(all="ignore"):
                try:
                    return _dtype(fields).type(number)
                except OverflowError:
                    raise InputError("a scalar out of the range of its dtype") from None
    return fields


def _array(fields: dict[Any, Any], limits: MessageLimits) -> NDArray[Any]:
    dtype, data, shape = _dtype(fields), _field(fields, "data"), _field(fields, "shape")
    if not isinstance(data, bytes):
        raise InputError("an array without bytes")
    if not isinstance(shape, (list, tuple)) or len(shape) > limits.ndim:
        raise InputError(f"an array whose shape is not a list of up to {limits.ndim} numbers")
    count = 1
    for length in shape:
        if type(length) is not int or not 0 <= length <= limits.size:
            raise InputError("an array whose shape is not made of integers")
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
    """Value of a field. Its name is bytes in openpi's messages, a string in those of other packers."""
    return fields.get(name.encode(), fields.get(name))


def _reject_extension(code: int, data: bytes) -> Any:
    raise InputError("a message with an extension type")
