"""A model in several GGUF files, `NAME-00001-of-00003.gguf` and so on, read as one.

Rule: the files say how many there are (`split.count`), which they are (`split.no`) and how many
tensors they hold together (`split.tensors.count`). All must be there and agree, whichever of them
was named; the metadata are those of the first.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from graphopt.errors import WeightFormatError
from graphopt.models.gguf.file import GgufFile, GgufTensor, open_gguf
from graphopt.models.gguf.schema import check_types

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_model(path: Path) -> GgufFile:
    """The header of `path`, joined with those of the other parts of its model.

    Raises WeightFormatError naming the part that is missing or does not fit.
    """
    file = _open(path)
    count = file.metadata.get("split.count", 1)
    if count in (0, 1):
        return file
    parts = [_open(part) for part in _paths(path, count)]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        stated = {"split.no": number, "split.count": count}
        for key, wanted in stated.items():
            if part.metadata.get(key) != wanted:
                raise WeightFormatError(
                    f"{part.path} has {key}={part.metadata.get(key)!r}; as part {number + 1} of "
                    f"{count} it must be {wanted}"
                )
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise WeightFormatError(f"{part.path} holds {twice[0]}, which an earlier part has, too")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise WeightFormatError(
            f"{parts[0].path} has split.tensors.count={total!r}, but its {count} parts hold "
            f"{len(tensors)} tensors"
        )
    return replace(parts[0], tensors=tensors)


def _open(path: Path) -> GgufFile:
    file = open_gguf(path)
    check_types(path, file.metadata)
    return file


def _paths(path: Path, count: int) -> list[Path]:
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise WeightFormatError(
            f"{path} is part of a model in {count} files (split.count), but is not called "
            f"NAME-00001-of-{count:05}.gguf, so the others cannot be found; give the files the "
            "names they were made with"
        )
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise WeightFormatError(
            f"{path} is part of a model in {count} files (split.count); missing in its folder: "
            f"{', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" * (len(missing) > 3))
        )
    return [path.parent / name for name in names]
