"""What stands before the tensors of a safetensors file: eight bytes of a length, and as much JSON.

The JSON says of each tensor, by its name, its dtype, its shape, and from where to where behind the header its bytes
stand (https://github.com/huggingface/safetensors, "Format"). Needs no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

LARGEST = 100_000_000  # bytes; the format's own limit
DTYPE_NAMES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "F8_E4M3": "torch.float8_e4m3fn",
    "F8_E5M2": "torch.float8_e5m2",
    "F8_E8M0": "torch.float8_e8m0fnu",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "I16": "torch.int16",
    "I8": "torch.int8",
    "U64": "torch.uint64",
    "U32": "torch.uint32",
    "U16": "torch.uint16",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
    "C64": "torch.complex64",
}
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def read(file: BinaryIO, size: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns what the header of a file of some size says of each tensor, unjudged, and where the first one begins.

    Raises:
        ValueError: it is no JSON, or longer than the file.
        struct.error: the file has less than its length.
        AttributeError, TypeError, RecursionError: it is JSON of another kind.
    """
    length, text = read_bytes(file, size - _LENGTH.size)
    document = json.loads(text)
    document.pop(_METADATA, None)
    return document, len(length) + len(text)


def read_bytes(file: BinaryIO, most: int = LARGEST) -> tuple[bytes, bytes]:
    """Returns the length, as it stands in the file, and the JSON behind it, of so many bytes at most.

    Raises:
        ValueError: it has more, or more than the format allows.
        struct.error: the file ends within the length.
    """
    length = file.read(_LENGTH.size)
    (count,) = _LENGTH.unpack(length)
    if count > min(most, LARGEST):
        raise ValueError("its header is longer than the file")
    return length, file.read(count)


def make(tensors: Mapping[str, Mapping[str, Any]], alignment: int) -> bytes:
    """Makes a header of what is to be said of each tensor, padded so that the first one begins at a multiple."""
    text = json.dumps({_METADATA: {"format": "pt"}, **tensors}).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % alignment)
    return _LENGTH.pack(len(text)) + text
