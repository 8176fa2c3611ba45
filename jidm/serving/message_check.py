"""Limits of a msgpack message, checked before anything of it is decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from jidm.errors import InputError

# After the first byte of a value: size of a fixed payload, or width of the length of a payload, list or map [bytes].
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS, _MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
_LENGTH = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}


@dataclass(frozen=True)
class MessageLimits:
    """Largest allowed message.

    Attributes:
        size: bytes, arrays included.
        objects: number of values, keys included.
        depth: nesting of maps and lists.
        ndim: axes of an array.
        frames: websocket frames that a client sends at once, those of a message in parts, pings and pongs included.
        duration: from the first part of a message to its last [s].
    """

    size: int = 32 * 2**20
    objects: int = 10_000
    depth: int = 16
    ndim: int = 6
    frames: int = 512
    duration: float = 20.0


def check_structure(data: bytes, limits: MessageLimits) -> None:
    """Walk through a message without decoding it (the msgpack specification, github.com/msgpack/msgpack).

    Raises:
        InputError: it is too large, ends too early or too late, has too many or too deeply nested values, or an extension
            type.
    """
    if len(data) > limits.size:
        raise InputError(f"a message of {len(data)} bytes; the largest allowed has {limits.size}")
    position, num_values, open_items = 0, 0, [1]  # values still to come, per nesting level
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        num_values += 1
        if num_values > limits.objects:
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
            if num_values + items > limits.objects:
                raise InputError(f"a message of more than {limits.objects} values")
            if len(open_items) > limits.depth:
                raise InputError(f"a message nested more than {limits.depth} deep")
            open_items.append(items)
    if position != len(data):
        raise InputError("a message that ends too early" if position > len(data) else "a message with trailing bytes")
