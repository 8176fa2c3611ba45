"""The wire format against an encoder of its own, and against what should never get through."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jidm.errors import InputError
from jidm.serving.codec import MessageLimits, pack, unpack

msgpack = pytest.importorskip("msgpack")

# ---- an encoder by the msgpack specification and openpi's description of arrays, written without looking at ours ------


def text(x: str) -> bytes:
    raw = x.encode()
    assert len(raw) < 32
    return bytes([0xA0 | len(raw)]) + raw


def binary(x: bytes) -> bytes:
    return b"\xc6" + struct.pack(">I", len(x)) + x


def mapping(*pairs: bytes) -> bytes:
    assert len(pairs) % 2 == 0 and len(pairs) < 32
    return bytes([0x80 | len(pairs) // 2]) + b"".join(pairs)


def short(x: bytes) -> bytes:
    return b"\xc4" + bytes([len(x)]) + x


def array(data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    sizes = bytes([0x90 | len(shape)]) + b"".join(b"\xce" + struct.pack(">I", n) for n in shape)
    return mapping(short(b"__ndarray__"), b"\xc3", short(b"data"), binary(data), short(b"dtype"), text(dtype), short(b"shape"), sizes)  # fmt: skip


def test_what_openpis_client_sends_is_understood() -> None:
    image = bytes(range(24))
    state = struct.pack("<3f", 0.5, -1.0, 2.0)
    message = mapping(
        text("observation/image"), array(image, "|u1", (2, 4, 3)), text("observation/state"), array(state, "<f4", (3,)),
        text("prompt"), text("pick up the cup"),
    )  # fmt: skip
    got = unpack(message)
    assert list(got) == ["observation/image", "observation/state", "prompt"] and got["prompt"] == "pick up the cup"
    assert got["observation/image"].dtype == np.uint8 and got["observation/image"][1, 3, 2] == 23
    np.testing.assert_array_equal(got["observation/state"], np.float32([0.5, -1, 2]))
    assert not got["observation/image"].flags.writeable


def test_what_is_sent_is_what_openpis_client_expects() -> None:
    actions = np.arange(6, dtype=np.float64).reshape(2, 3)
    got = msgpack.unpackb(pack({"actions": actions, "server_timing": {"infer_ms": np.float32(1.5)}}))
    fields = got["actions"]
    assert fields == {b"__ndarray__": True, b"data": actions.tobytes(), b"dtype": "<f8", b"shape": [2, 3]}
    assert got["server_timing"]["infer_ms"] == {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}


def test_scalars_of_both_names() -> None:
    for name in (b"__npgeneric__", b"__npscalar__"):
        value = unpack(mapping(short(name), b"\xc3", short(b"data"), b"\x07", short(b"dtype"), text("<i4")))
        assert value == 7 and value.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["?", "i1", "<i8", ">i4", "u1", "<u2", "<f2", ">f4", "<f8"]),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 99),
)
def test_arrays_come_back(dtype: str, shape: list[int], seed: int) -> None:
    x = np.asarray(np.random.default_rng(seed).normal(size=shape) * 50).astype(dtype)
    got = unpack(pack({"x": [x, {"y": None, "z": "ü", "b": b"\x00"}]}))
    np.testing.assert_array_equal(got["x"][0], x)
    assert got["x"][0].shape == x.shape and got["x"][0].dtype == x.dtype.newbyteorder("=")
    assert got["x"][1] == {"y": None, "z": "ü", "b": b"\x00"}


BAD = {
    "objects": array(b"\0" * 8, "|O", (1,)),
    "objects of a size": array(b"\0" * 8, "|O8", (1,)),
    "structures": array(b"\0" * 8, "f4,f4", (1,)),
    "complex": array(b"\0" * 8, "<c8", (1,)),
    "dates": array(b"\0" * 8, "<M8[s]", (1,)),
    "text": array(b"\0" * 8, "<U2", (1,)),
    "void": array(b"\0" * 8, "|V8", (1,)),
    "long double": array(b"\0" * 16, "<f16", (1,)),
    "a lying shape": array(b"\0" * 8, "<f4", (3,)),
    "a huge shape": array(b"", "|u1", (2**32 - 1, 2**32 - 1, 0)),
    "a giant rank": array(b"\0", "|u1", (1,) * 15),
    "a negative shape": array(b"\0", "|u1", (1,)).replace(b"\xce\0\0\0\1", b"\xd2\xff\xff\xff\xff"),
    "a shape of floats": array(b"\0", "|u1", (1,)).replace(b"\xce\0\0\0\1", b"\xca\x3f\x80\0\0"),
    "no bytes": mapping(short(b"__ndarray__"), b"\xc3", short(b"dtype"), text("|u1"), short(b"shape"), b"\x90"),
    "a scalar of text": mapping(short(b"__npgeneric__"), b"\xc3", short(b"data"), text("x"), short(b"dtype"), text("<i4")),
    "a scalar too large": mapping(short(b"__npgeneric__"), b"\xc3", short(b"data"), b"\xcd\x0f\xff", short(b"dtype"), text("|u1")),
    "an extension": b"\xc7\x01\x05\x00",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "nothing": b"",
    "half": mapping(text("a"), b"\x01")[:-1],
    "more": b"\x01\x01",
    "a nested bomb": b"\x91" * 5000 + b"\x01",
    "a wide bomb": b"\xdc\xff\xff" + b"\x90" * 65535,
    "a bomb of promises": b"\xdd\xff\xff\xff\xff",
    "keys that are no text": mapping(b"\x01", b"\x01"),
    "not UTF-8": b"\xa2\xff\xfe",
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_must_not_get_through(what: str) -> None:
    with pytest.raises(InputError):
        unpack(BAD[what])


def test_text_is_no_message() -> None:
    with pytest.raises(InputError, match="bytes"):
        unpack("hello")


def test_a_bomb_costs_nothing() -> None:
    bomb = b"\xdc\x10\x00" + (b"\xdc\x10\x00" + b"\x90" * 4096) * 4096  # 17 million empty lists
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 10000"):
        unpack(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(bomb)


def test_limits_are_those_given() -> None:
    with pytest.raises(InputError, match="largest allowed has 10"):
        unpack(pack({"x": "0123456789"}), MessageLimits(size=10))
    with pytest.raises(InputError, match="up to 1 numbers"):
        unpack(pack(np.zeros((2, 2))), MessageLimits(ndim=1))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_anything_is_a_message_or_refused(data: bytes) -> None:
    with suppress(InputError):
        unpack(data)


@settings(max_examples=100, deadline=None)
@given(value=st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=40) | st.binary(max_size=40), lambda x: st.lists(x, max_size=20) | st.dictionaries(st.text(max_size=5), x, max_size=20), max_leaves=40))  # fmt: skip
def test_whatever_msgpack_writes_is_counted_rightly(value: object) -> None:
    assert unpack(msgpack.packb(value)) == value


@pytest.mark.parametrize(
    "wrong", [np.array(["a"]), np.array([None]), np.zeros(2, "c8"), np.zeros(2, "f4,f4"), object(), {1, 2}]
)
def test_what_is_no_number_is_not_sent(wrong: object) -> None:
    with pytest.raises(InputError, match="cannot be sent"):
        pack({"x": wrong})
