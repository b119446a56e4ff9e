"""What the attacks are made with: files changed behind our back, and what must not happen then."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from limits import little_room
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltamix_hf
from deltamix_hf import DeltaMixError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODULE = "model.layers.0.self_attn.o_proj"
ROOM = 1 << 30  # bytes of address space an attack may take; those that ask for more ask for 2^40

Header = dict[str, Any]


def read_raw(file: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: Header | bytes, data: bytes = b"") -> None:
    """A safetensors file of our own making; `header` is JSON-encoded unless it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(file: Path, change: Callable[[Header], object]) -> None:
    header, data = read_raw(file)
    change(header)
    write_raw(file, header, data)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors of the weight file, which stays a sound one."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """`change(value)` in place, or a new value if it returns one."""
    value = json.loads(file.read_text())
    changed = change(value)
    file.write_text(json.dumps(value if changed is None else changed))


def edit_settings(folder: Path, **changes: Any) -> None:
    """Change keys of `quantization_config`; None removes."""

    def change(config: Any) -> None:
        config["quantization_config"] |= changes
        for name in [name for name, value in changes.items() if value is None]:
            del config["quantization_config"][name]

    edit_json(folder / "config.json", change)


def refusal(action: Callable[[], object], *parts: str) -> str:
    """The one line that `action` must be refused with; it must hold all `parts`."""
    with little_room(ROOM), pytest.raises(DeltaMixError) as error:
        action()
    message = str(error.value)
    for part in parts:
        assert part in message
    assert message.isprintable() and len(message) < 2000
    return message


def refused_by_us_or_before(action: Callable[[], object]) -> None:
    """As `refusal`, or by transformers while it had not asked us yet; its errors are its own."""
    with little_room(ROOM), pytest.raises(Exception) as error:
        action()
    assert not isinstance(error.value, MemoryError)
    if not isinstance(error.value, DeltaMixError):
        ours = os.path.dirname(deltamix_hf.__file__)
        through = "registration.py"  # every `from_pretrained` does
        places = [str(entry.path) for entry in error.traceback]
        assert not any(p.startswith(ours) and not p.endswith(through) for p in places)


_watched: list[tuple[Path, list[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "exec", "socket.connect"):
        for folder, seen in _watched:
            name = str(getattr(arguments[0], "co_filename", arguments[0]))
            if os.path.realpath(name).startswith(f"{folder}{os.sep}"):
                seen.append(f"{event} {name}")


sys.addaudithook(_watch)


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in `folder` may be opened, listed or executed within."""
    seen: list[str] = []
    entry = (Path(os.path.realpath(folder)), seen)
    _watched.append(entry)
    try:
        yield
    finally:
        _watched.remove(entry)
    assert not seen
