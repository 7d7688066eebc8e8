"""Saved programs with damaged files, the manifest hashed anew or not.

Without new hashes a program is refused, or is the intact one. With them, what says nothing about
the graph must leave the answers as they are; a changed graph, weight or option may answer anything
or be refused by name, within its buffers: no crash, no hang, no other exception.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.program.program import Program

from . import gir
from .harness import WrongError

IDS = torch.tensor([[5, 3, 8, 1, 9, 2], [1, 1, 2, 3, 5, 8]])
PROMPT, TOKENS = [4, 7, 2], 4
_GRAPHS = ("forward.gir", "serving.gir")
# What no answer depends on.
_TOLD = ("report.json", "trace")


class Mini(nn.Module):
    """A language model of one attention layer."""

    def __init__(self, width: int = 16, vocabulary: int = 23) -> None:
        super().__init__()
        self.embed, self.gain = nn.Embedding(vocabulary, width), nn.Parameter(torch.rand(width) + 1)
        self.qkv, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1)
        )
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x + F.silu(self.gate(x)) * x)


class Classifier(nn.Module):
    """No language model: a forward graph alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(23, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids).mean(1))


def answers(program: Program) -> tuple[Any, Any]:
    """What a program computes, and what it generates where it is served."""
    found = program(IDS)
    logits = found if isinstance(found, Tensor) else found[0]
    if program.serving is None:
        return logits, None
    (completion,) = program.generate(PROMPT, max_tokens=TOKENS, temperature=0.0)
    return logits, list(completion.tokens)


class SavedPrograms:
    """One damage of one program."""

    ci_count = 60

    def __init__(self, folder: Path) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        made = {
            "cpu": graphopt.compile(Mini().eval()),
            "reference": graphopt.compile(Mini().eval(), backend="reference"),
            "forward": graphopt.compile(Classifier().eval(), IDS),
        }
        self._intact: list[tuple[Path, tuple[Any, Any]]] = []
        for name, program in made.items():
            program.save(folder / name)
            self._intact.append((folder / name, answers(program)))
        self._lines = [
            line
            for path, _ in self._intact
            for file in path.glob("*.gir")
            for line in file.read_text().splitlines()
        ]

    def run(self, numbers: random.Random, folder: Path) -> int:
        path, expected = numbers.choice(self._intact)
        target = folder / "program"
        shutil.copytree(path, target)
        damage = numbers.choice(list(_DAMAGES))
        is_told = _DAMAGES[damage](target, numbers, self._lines)
        is_hashed = numbers.random() < 0.7
        if is_hashed:
            _hash_anew(target)
        (folder / "case.txt").write_text(f"{path.name} {damage} hashed anew: {is_hashed}")
        backend = numbers.choice((None, None, "cpu", "reference"))
        program = graphopt.load_program(target, backend=backend, threads=None)
        found = answers(program)
        must_agree = not is_hashed or is_told
        if must_agree and not _agree(found, expected):
            raise WrongError(f"{damage} ({path.name}): answers differ from the intact program's")
        return 1


def _agree(found: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    same = found[0].shape == expected[0].shape
    return same and torch.allclose(found[0], expected[0], atol=1e-4) and found[1] == expected[1]


def _hash_anew(folder: Path) -> None:
    """The manifest lists what lies there, as `write_manifest` does."""
    manifest = folder / "manifest.json"
    try:
        data = json.loads(manifest.read_text())
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p != manifest)
        data["files"] = {
            p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        }
        manifest.write_text(json.dumps(data))
    except (OSError, ValueError, TypeError, AttributeError):
        # The manifest itself is what was damaged.
        return


Damage = Callable[[Path, random.Random, list[str]], bool]
"""Damages a folder; True where the answers must stay what they are, whatever is hashed."""


def _some_file(folder: Path, numbers: random.Random) -> Path:
    return numbers.choice(sorted(p for p in folder.rglob("*") if p.is_file()))


def _is_told(path: Path, folder: Path) -> bool:
    return path.relative_to(folder).parts[0] in _TOLD


def _bytes(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """A few bytes of any file become others."""
    path = _some_file(folder, numbers)
    data = bytearray(path.read_bytes())
    for _ in range(numbers.choice((1, 1, 3, 40))):
        if data:
            data[numbers.randrange(len(data))] = numbers.randrange(256)
    path.write_bytes(bytes(data))
    return _is_told(path, folder)


def _cut(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """A file ends too early, or has more at its end."""
    path = _some_file(folder, numbers)
    data = path.read_bytes()
    at = numbers.choice((0, 1, 8, len(data) // 2, max(0, len(data) - 1)))
    path.write_bytes(data[:at] if numbers.random() < 0.7 else data + b"\0" * 64)
    return _is_told(path, folder)


def _missing(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """A file is not there, or a folder in its place, or there is one too many."""
    path = _some_file(folder, numbers)
    kind = numbers.randrange(4)
    if kind == 3:
        (folder / numbers.choice(("extra", "trace/99_x.gir", "forward.gir.bak"))).write_text("x")
        return True
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(numbers.choice(("nowhere", "../program", "manifest.json")))
    return _is_told(path, folder)


def _swapped(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """Two files in each other's place."""
    a, b = _some_file(folder, numbers), _some_file(folder, numbers)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return _is_told(a, folder) and _is_told(b, folder)


def _graph(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """A graph text is mutated."""
    files = [folder / name for name in _GRAPHS if (folder / name).exists()]
    path = numbers.choice(files)
    text = path.read_text()
    for _ in range(numbers.choice((1, 1, 2))):
        text = numbers.choice(gir.MUTATIONS)(text, numbers, lines)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return False


def _weights_header(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """The header of the weights says something else."""
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = numbers.choice(names)
    entry = header[name]
    match numbers.randrange(8):
        case 0:
            entry["dtype"] = numbers.choice(("F64", "I8", "BOOL", "F4", "U64", "C64", 3))
        case 1:
            entry["shape"] = numbers.choice(([], [1], [-1], [10**18], entry["shape"][::-1], "x"))
        case 2:
            entry["data_offsets"] = numbers.choice(([0, 4], [4, 0], [0, 10**15], [-4, 0], None))
        case 3:
            del header[name]
        case 4:
            header[name], other = header[numbers.choice(names)], entry
            header["other"] = other
        case 5:
            header["__metadata__"] = {"a": "b"}
        case 6:
            header = numbers.choice(([], {}, {"x": 3}, "x"))
        case 7:
            length = numbers.choice((0, 1, 2**40, 2**63))
    raw = json.dumps(header).encode()
    if length < 2**20:
        length = len(raw)
    path.write_bytes(struct.pack("<Q", length) + raw + data[8 + len(raw) :])
    return False


def _weights_values(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """Weights hold nan, infinities, or bits at random."""
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(30):
        at = 8 + length + 4 * numbers.randrange((len(data) - 8 - length) // 4)
        data[at : at + 4] = numbers.choice(
            (struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), numbers.randbytes(4))
        )
    path.write_bytes(bytes(data))
    return False


def _options(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """An entry of the manifest is another value, goes, or is added."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    values: list[Any] = [
        *(None, True, False, 0, -1, 1, 3, 2**70, 0.5, 1e400, "", "x", "cpu", "reference"),
        *([], [1], [-1], [None], {}, {"a": 1}, "float16", [[1]], "\ud800", "a\0b"),
    ]
    part = numbers.choice((data, data["options"], data["options"]["default_sampling"]))
    name = numbers.choice([*part, "new"])
    if numbers.random() < 0.2:
        part.pop(name, None)
    else:
        part[name] = numbers.choice(values)
    path.write_text(json.dumps(data))
    return False


def _report(folder: Path, numbers: random.Random, lines: list[str]) -> bool:
    """The report says something else, or is none."""
    path = folder / "report.json"
    text = path.read_text()
    at = numbers.randrange(len(text))
    cut = (
        text[:at] + numbers.choice(("", "]", "}", '"', "[" * 99_999, "0", "null")) + text[at + 1 :]
    )
    path.write_text(numbers.choice((cut, "[]", "{}", "3", "null", '{"passes": 3}', "")))
    return True


_DAMAGES: dict[str, Damage] = {
    "bytes": _bytes,
    "cut": _cut,
    "missing": _missing,
    "swapped": _swapped,
    "graph": _graph,
    "graph again": _graph,
    "graph once more": _graph,
    "weights' header": _weights_header,
    "weights' values": _weights_values,
    "options": _options,
    "report": _report,
}
FUZZER = SavedPrograms
