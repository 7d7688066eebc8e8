"""Ways to damage a GGUF file, and some that leave the model what it was.

Each takes random numbers and the parts, which it changes. Those of `HARMLESS` change nothing that
a reader of the model looks at.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from .gguf_parts import ARRAY, BOOL, FORMATS, STRING, U32, U64, Parts, Value

Change = Callable[[random.Random, Parts], None]
_INTEGERS = (0, 1, 2, 3, 5, 7, 31, 64, 255, 2**16, 10**4, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
_SIZES = (*_INTEGERS, 2**40, 2**62, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-5, 1e30, -1e30, 3e38, float("nan"), float("inf"), -float("inf"))
_TEXTS = (
    b"",
    b"llama",
    b"gpt2",
    b"\xff\xfe",
    b"x" * 5000,
    "é☃".encode(),
    b"none",
    b"linear",
    b"a b",
)


def scalar(numbers: random.Random) -> Value:
    """A number or text of any type, often an extreme one."""
    kind = numbers.choice([*FORMATS, STRING])
    if kind == STRING:
        return Value(kind, numbers.choice(_TEXTS))
    if FORMATS[kind] in "fd":
        return Value(kind, numbers.choice(_FLOATS))
    bits = 8 * struct.calcsize("<" + FORMATS[kind])
    value = numbers.choice(_SIZES) % 2**bits
    signed = FORMATS[kind].islower()
    return Value(kind, value - 2**bits if signed and value >= 2 ** (bits - 1) else value)


def array(numbers: random.Random) -> Value:
    """A list of any type, flat or nested, its length true or not."""
    if numbers.random() < 0.2:
        depth = numbers.choice([1, 2, 50, 5000])
        return Value(ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0))
    one = scalar(numbers)
    value = Value(ARRAY, [one] * numbers.choice([0, 1, 2, 3, 17]), one.type)
    if numbers.random() < 0.3:
        value.count = numbers.choice(_SIZES)
    return value


def other_value(numbers: random.Random, parts: Parts) -> None:
    place = numbers.randrange(len(parts.fields))
    make = numbers.choice([scalar, scalar, array])
    parts.fields[place] = (parts.fields[place][0], make(numbers))


def other_number(numbers: random.Random, parts: Parts) -> None:
    """The same type, another number."""
    numeric = [i for i, (_, value) in enumerate(parts.fields) if value.type in FORMATS]
    key, value = parts.fields[place := numbers.choice(numeric)]
    while (new := scalar(numbers)).type != value.type:
        pass
    if numbers.random() < 0.5 and value.type == U32:
        new.data = (value.data + numbers.choice([-1, 1, value.data, 31])) % 2**32
    parts.fields[place] = (key, new)


def inside_a_list(numbers: random.Random, parts: Parts) -> None:
    lists = [
        value
        for _, value in parts.fields
        if value.type == ARRAY and isinstance(value.data, list) and value.data
    ]
    if not lists:
        return other_value(numbers, parts)
    value = numbers.choice(lists)
    place = numbers.randrange(len(value.data))
    match numbers.randrange(4):
        case 0:
            del value.data[place]
        case 1:
            value.data.append(value.data[place])
        case 2:
            value.data[place] = value.data[numbers.randrange(len(value.data))]
        case _:
            while (new := scalar(numbers)).type != value.item:
                pass
            value.data[place] = new
    return None


def lists_of_keys(numbers: random.Random, parts: Parts) -> None:
    """A number as a list, once for every layer or not."""
    place = numbers.randrange(len(parts.fields))
    key, value = parts.fields[place]
    if value.type in FORMATS:
        parts.fields[place] = (key, Value(ARRAY, [value] * numbers.randrange(4), value.type))


def fields_moved(numbers: random.Random, parts: Parts) -> None:
    place, other = (numbers.randrange(len(parts.fields)) for _ in range(2))
    key, value = parts.fields[place]
    match numbers.randrange(4):
        case 0:
            del parts.fields[place]
        case 1:
            parts.fields.insert(other, (key, numbers.choice([value, scalar(numbers)])))
        case 2:
            parts.fields[place] = (key, parts.fields[other][1])
            parts.fields[other] = (parts.fields[other][0], value)
        case _:
            name = bytearray(key or b"x")
            name[numbers.randrange(len(name))] = numbers.randrange(256)
            parts.fields[place] = (bytes(name), value)


def new_field(numbers: random.Random, parts: Parts) -> None:
    prefix = dict(parts.fields).get(b"general.architecture", Value(STRING, b"llama")).data
    names = (
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "vocab_size"),
        *("expert_count", "attention.sliding_window", "attention.scale", "logit_scale"),
        *("attention.head_count_kv", "rope.dimension_count", "a_key_of_tomorrow"),
    )
    general = (
        *("general.alignment", "split.count", "split.no", "split.tensors.count", "general.type"),
        *("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "adapter.type"),
        *("tokenizer.ggml.suppress_tokens", "tokenizer.ggml.padding_token_id"),
        *("tokenizer.chat_template", "tokenizer.chat_template.tool_use", "tokenizer.ggml.tokens"),
        *("tokenizer.ggml.scores", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.model"),
        *("general.quantization_version", "general.sampling.temp", "tokenizer.ggml.token_type"),
    )
    own = [prefix + b"." + name.encode() for name in names] if isinstance(prefix, bytes) else []
    key = numbers.choice([*own, *(name.encode() for name in general)])
    parts.fields = [(known, value) for known, value in parts.fields if known != key]
    parts.fields.append((key, numbers.choice([scalar, scalar, array])(numbers)))


def other_shape(numbers: random.Random, parts: Parts) -> None:
    tensor = numbers.choice(parts.tensors)
    if not tensor.dims:
        return
    match numbers.randrange(6):
        case 0:
            tensor.dims[numbers.randrange(len(tensor.dims))] = numbers.choice(_SIZES)
        case 1:
            tensor.dims.reverse()
        case 2:
            tensor.dims = []
        case 3:
            tensor.dims += [1] * numbers.randrange(1, 5)
        case 4:
            tensor.rank = numbers.choice(_INTEGERS)
        case _:
            place = numbers.randrange(len(tensor.dims))
            tensor.dims[place] = max(0, tensor.dims[place] + numbers.choice([-32, -1, 1, 32]))


def other_blocks(numbers: random.Random, parts: Parts) -> None:
    numbers.choice(parts.tensors).type = numbers.choice([*range(42), 255, 2**31, 2**32 - 1])


def other_place(numbers: random.Random, parts: Parts) -> None:
    """An offset of its own: onto another tensor, off the alignment, out of the file."""
    data = sum(len(tensor.data) for tensor in parts.tensors)
    places = [0, 32, data, data // 2 // 32 * 32, numbers.randrange(data), *_SIZES]
    tensor = numbers.choice(parts.tensors)
    parts.tail += bytes(len(tensor.data))
    tensor.offset = numbers.choice(places)


def tensors_moved(numbers: random.Random, parts: Parts) -> None:
    place, other = (numbers.randrange(len(parts.tensors)) for _ in range(2))
    first, second = parts.tensors[place], parts.tensors[other]
    match numbers.randrange(5):
        case 0:
            del parts.tensors[place]
        case 1:
            parts.tensors.insert(other, first)
        case 2:
            first.name, second.name = second.name, first.name
        case 3:
            names = (
                b"blk.0.",
                b"blk.1.",
                b"blk.7.",
                b"blk.99999999999.",
                b"blk.-1.",
                "blk.².".encode(),
            )
            first.name = numbers.choice(names) + first.name.rpartition(b".")[0].rpartition(b".")[2]
        case _:
            name = bytearray(first.name)
            name[numbers.randrange(len(name))] = numbers.randrange(256)
            first.name = bytes(name)


def other_header(numbers: random.Random, parts: Parts) -> None:
    match numbers.randrange(4):
        case 0:
            parts.magic = numbers.choice([b"GGUf", b"FUGG", b"GGML", bytes(4)])
        case 1:
            parts.version = numbers.choice([0, 1, 2, 4, 2**31, 3 << 24])
        case 2:
            parts.counts = (numbers.choice(_SIZES), None)
        case _:
            parts.counts = (None, numbers.choice(_SIZES))


def order_of_fields(numbers: random.Random, parts: Parts) -> None:
    numbers.shuffle(parts.fields)


def order_of_tensors(numbers: random.Random, parts: Parts) -> None:
    numbers.shuffle(parts.tensors)


def gaps(numbers: random.Random, parts: Parts) -> None:
    parts.gap = numbers.choice([1, 2, 30])


def longer(numbers: random.Random, parts: Parts) -> None:
    parts.tail = numbers.randbytes(numbers.choice([1, 100]))


def alignment(numbers: random.Random, parts: Parts) -> None:
    parts.alignment = numbers.choice([8, 16, 64, 256, 4096])
    parts.fields = [(key, value) for key, value in parts.fields if key != b"general.alignment"]
    parts.fields.append((b"general.alignment", Value(U32, parts.alignment)))


def description(numbers: random.Random, parts: Parts) -> None:
    make = numbers.choice([Value(STRING, numbers.choice(_TEXTS)), Value(U64, 3), Value(BOOL, 1)])
    parts.fields.append((b"general.description", make))


def version_2(_: random.Random, parts: Parts) -> None:
    parts.version = 2


HARMLESS: tuple[Change, ...] = (
    *(order_of_fields, order_of_tensors, gaps, longer, alignment, description, version_2),
)
DAMAGING: tuple[Change, ...] = (
    *(other_value, other_number, other_number, inside_a_list, lists_of_keys, fields_moved),
    *(new_field, new_field, other_shape, other_blocks, other_place, tensors_moved, other_header),
)


def damage_bytes(numbers: random.Random, data: bytes) -> bytes:
    """Cut, flip, insert, remove or overwrite, anywhere; in the header more often than not."""
    changed = bytearray(data)
    header = data.find(b"output_norm") + 64
    end = header if numbers.random() < 0.7 else len(data)
    for _ in range(numbers.choice([1, 1, 1, 3, 20])):
        place = numbers.randrange(min(end, len(changed)) or 1)
        match numbers.randrange(6):
            case 0:
                del changed[place:]
            case 1:
                del changed[place : place + numbers.choice([1, 4, 8, 100])]
            case 2:
                changed[place:place] = numbers.randbytes(numbers.choice([1, 4, 8, 100]))
            case 3:
                changed[place : place + 8] = struct.pack("<Q", numbers.choice(_SIZES))
            case _:
                if place < len(changed):
                    changed[place] ^= 1 << numbers.randrange(8)
    return bytes(changed)
