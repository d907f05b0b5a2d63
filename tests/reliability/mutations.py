"""Changes to files that keep enough of their form to come past the first check."""

from __future__ import annotations

import io
import json
import random
import zipfile
from typing import Any

_INTERESTING: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**40,
    2**63,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x00",
    "../../x",
    "/etc/passwd",
    "\udc80",
    "[MASK]",
    "weight",
    "nn.Linear",
    "os.system",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "1" * 5000,
    "é" * 50,
    {"class_path": "os.system", "init_args": {"command": "true"}},
    {"op": "quantize"},
    {"op": "reduce_layers", "layers": [0]},
)


def mutate_bytes(data: bytes, source: random.Random, limit: int) -> bytes:
    """Flip, insert, drop, repeat or cut a few bytes."""
    content = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
        place = source.randrange(len(content) + 1)
        kind = source.randrange(6)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << source.randrange(8)
        elif kind == 1 and content:
            content[place % len(content)] = source.randrange(256)
        elif kind == 2:
            content[place:place] = source.choice((b"\t", b"\n", b'"', b",", b"\x00", b"[", b"{", b"\xff", b"0", b"- "))
        elif kind == 3:
            del content[place : place + source.choice((1, 2, 8, 64))]
        elif kind == 4:
            content[place:place] = content[place : place + source.choice((4, 16, 100))]
        elif source.random() < 0.2:
            del content[place:]
    return bytes(content[:limit])


def mutate_json(data: bytes, source: random.Random, limit: int) -> bytes:
    """Change a few values, keys or places in a JSON document; what is none gets other bytes."""
    if source.random() < 0.15:
        return mutate_bytes(data, source, limit)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, source, limit)
    for _ in range(source.choice((1, 1, 2, 3))):
        content = mutate_tree(content, source)
    try:
        return json.dumps(content).encode(errors="surrogatepass")[:limit]
    except (ValueError, RecursionError):
        return mutate_bytes(data, source, limit)


def mutate_tree(content: Any, source: random.Random) -> Any:
    """Change one place in nested lists and mappings, at any depth."""
    if isinstance(content, dict) and content and source.random() < 0.9:
        key = source.choice(list(content))
        changed = dict(content)
        kind = source.random()
        if kind < 0.08:
            del changed[key]
        elif kind < 0.12:
            changed[str(source.choice(_INTERESTING))] = changed.pop(key)
        elif kind < 0.16:
            changed[key] = changed[source.choice(list(content))]
        else:
            changed[key] = mutate_tree(changed[key], source)
        return changed
    if isinstance(content, list) and content and source.random() < 0.9:
        changed = list(content)
        place = source.randrange(len(changed))
        kind = source.random()
        if kind < 0.1:
            del changed[place]
        elif kind < 0.2:
            changed.insert(place, source.choice(changed))
        else:
            changed[place] = mutate_tree(changed[place], source)
        return changed
    if isinstance(content, int) and not isinstance(content, bool) and source.random() < 0.5:
        return content + source.choice((-1, 1, 2, -content - 1, 255, 2**33))
    if isinstance(content, str) and content and source.random() < 0.4:
        return mutate_bytes(content.encode(errors="replace"), source, 10_000).decode(errors="replace")
    return source.choice(_INTERESTING)


def mutate_safetensors(data: bytes, source: random.Random, limit: int) -> bytes:
    """Change the header as JSON, with the right length before it, or bytes anywhere."""
    length = int.from_bytes(data[:8], "little")
    if source.random() < 0.3 or length > len(data):
        return mutate_bytes(data, source, limit)
    header = mutate_json(data[8 : 8 + length], source, limit)
    return (len(header).to_bytes(8, "little") + header + data[8 + length :])[:limit]


def mutate_zip(data: bytes, source: random.Random, limit: int) -> bytes:
    """Change one entry of a zip archive, which then has a right checksum again; torch's checkpoints are such ones."""
    if source.random() < 0.3:
        return mutate_bytes(data, source, limit)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError):
        return mutate_bytes(data, source, limit)
    pickles = [place for place, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    place = pickles[0] if pickles and source.random() < 0.7 else source.randrange(max(1, len(entries)))
    if entries:
        name, content = entries[place]
        entries[place] = (name, mutate_bytes(content, source, limit))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()[:limit]
