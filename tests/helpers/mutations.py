"""Files changed a little, so that what is read goes wrong deep inside: what `test_fuzz.py` does.

Everything is drawn from the `random.Random` it is given, so a run can be repeated by its number.
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 2**15 - 1, 2**15),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e300, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *(
        "",
        "x",
        "a" * 10_000,
        "../../etc/passwd",
        "/etc/passwd",
        "~",
        ".",
        "..",
        "\0",
        "a\nb",
        "\x1b[2J",
    ),
    *("http://127.0.0.1:9/x", "\\\\server\\share", "//server/share", "\ud800", "é", "F32", "I16"),
    *("U8", "F4", "gaussian", "min-max", "deltamix", "delta-come", "model.safetensors", "None"),
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "",
]


def some_value(rng: random.Random) -> Any:
    """A JSON value that a careless reader trips over."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice([None, True, False, [], {}])
    if kind == 2:
        return [some_value(rng) for _ in range(rng.randrange(4))]
    if kind == 3:
        return {rng.choice(TEXTS): some_value(rng) for _ in range(rng.randrange(3))}
    if kind == 4 and rng.random() < 0.1:
        return _nested(rng.choice([50, 900, 5000]))
    return rng.choice(NUMBERS)


class _nested:
    """Brackets within brackets, which `json.dumps` itself cannot write."""

    def __init__(self, depth: int):
        self.depth = depth


class Twice(dict):
    """A JSON object with one key a second time."""

    again: tuple[str, Any]


def dumps(value: Any) -> str:
    """JSON, with what `json.dumps` does not write: nesting without end, a key twice."""
    if isinstance(value, _nested):
        return "[" * value.depth + "]" * value.depth
    if isinstance(value, dict):
        pairs = [*value.items(), *([value.again] if isinstance(value, Twice) else [])]
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**30:
        return "1" + "0" * (len(hex(value)) if value < 10**300 else 5000)
    return json.dumps(value)


def change_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The same with one place changed, rather deep than at the top."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.85):
        key = rng.choice(list(value))
        action = rng.randrange(12)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            twice = Twice(value)
            twice.again = (key, rng.choice([value[key], some_value(rng)]))
            return twice
        if action == 2:
            other = rng.choice([*TEXTS, *value])
            return {(other if k == key else k): v for k, v in value.items()}
        if action == 3:
            other = rng.choice(list(value))
            return value | {key: value[other], other: value[key]}
        if action == 4:
            return value | {rng.choice([*TEXTS, "self", "base_kwargs"]): some_value(rng)}
        return value | {key: change_json(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place, changed = rng.randrange(len(value)), list(value)
        if rng.random() < 0.2:
            del changed[place]
        else:
            changed[place] = change_json(value[place], rng, depth + 1)
        return changed
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-2, -1, 1, 2, 8, -value, value])
    return some_value(rng)


def change_bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Flipped bits, a cut, a block put in, taken out, moved, or from another file."""
    data = bytearray(content)
    # half of the time where the structure is
    end = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    place, length = rng.randrange(max(end, 1)), 1 << rng.randrange(10)
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(1 << rng.randrange(5)):
            if data:
                data[rng.randrange(max(end, 1))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        edges = [0, 1, 7, 8, 9, len(data) - 1, place]
        del data[max(0, rng.choice(edges)) :]
    elif kind == 2:
        data[place:place] = rng.randbytes(length)
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        other, start = rng.choice(others), rng.randrange(4096)
        data[place : place + length] = other[start : start + length]
    elif kind == 5:
        word = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, 10**8])
        place = rng.choice([0, place])
        data[place : place + 8] = struct.pack("<Q", word % 2**64)
    else:
        data[place : place + length] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * length
    return bytes(data)


def change_header(content: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, its length kept right, the data as they are or cut to fit."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 2])):
        name, other = rng.choice(names), rng.choice(names)
        action, entry = rng.randrange(8), dict(header.get(name) or {})
        if action == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif action == 1:
            entry["shape"] = [rng.choice([*NUMBERS, 1, 1, 64]) for _ in range(rng.randrange(5))]
        elif action == 2 and entry:
            entry["shape"] = entry["shape"][::-1] + [1] * rng.randrange(3)
        elif action == 3 and entry:
            start, end = entry["data_offsets"]
            shift = rng.choice([-start, -1, 1, 8, len(data), 2**62])
            entry["data_offsets"] = [start + shift, end + rng.choice([0, shift])]
        elif action == 4:
            header[name], header[other] = header.get(other), header.get(name)
            continue
        elif action == 5:
            moved = header.pop(name, None)
            suffix = rng.choice([".dm_v", ".dm_zeros", ".weight", ".bias", "", ":x", "\n"])
            stem = other.rpartition(".")[0]
            header[rng.choice([stem + suffix, *TEXTS])] = moved
            continue
        else:
            header = change_json(header, rng)
            break
        header[name] = entry
    text = dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def change_words(content: bytes, rng: random.Random) -> bytes:
    """Words of one packed tensor, most often of the widths and scales."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content)
    parts = ["dm_ranks"] * 3 + ["dm_zeros", "dm_v", "dm_u"]
    wanted = rng.choice(parts)
    names = [name for name in header if name.endswith(wanted)] or list(header)
    start, end = header[rng.choice(names)].get("data_offsets", (0, len(data)))
    row = max(2, (end - start) // rng.choice([1, 8, 16, 32]))
    for _ in range(1 << rng.randrange(4)):
        word = rng.choice([0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0000, 0xFFFF, 0x4F80, 0x4F7F, 0x0001])
        word = rng.choice([word, rng.randrange(1 << 16), rng.randrange(256)])
        place = rng.choice([0, row * rng.randrange(max(1, (end - start) // row))])
        place = rng.choice([place, rng.randrange(max(1, end - start))])
        at = 8 + length + start + place // 2 * 2
        data[at : at + 2] = struct.pack("<H", word)
    return bytes(data[: len(content)])


def mutated(files: dict[str, bytes], rng: random.Random, ours: bool) -> tuple[str, bytes]:
    """One file of a repo, changed in one to three ways; `ours`: of config.json, our part alone.

    A config.json that asks for a billion layers keeps transformers busy before it asks us.
    """
    name = rng.choice(list(files))
    content = files[name]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            if rng.random() < 0.3:
                content = change_bytes(content, rng, list(files.values()))
            elif name.endswith(".json"):
                value = json.loads(content)
                if ours and name == "config.json":
                    value["quantization_config"] = change_json(value["quantization_config"], rng)
                else:
                    value = change_json(value, rng)
                text = dumps(value)
                content = text.encode("utf-8", "surrogatepass")
            else:
                content = rng.choice([change_header, change_words])(content, rng)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, IndexError):
            break  # what was changed already has no structure to change any more
        except RecursionError:
            break
    return name, content
