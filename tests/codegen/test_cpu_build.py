"""Building, caching and loading the native library; its ABI; its threads and forks."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import shutil
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path

import pytest
import torch
from native_plan import call, execute, instruction

from graphopt.codegen.cpu import abi, build
from graphopt.codegen.cpu.abi import Instr, Op, UnaryKind
from graphopt.config import Config
from graphopt.errors import BackendError


def header() -> str:
    text = (build.SOURCES / "abi.h").read_text()
    return re.sub(r"//[^\n]*", "", text)


def test_enums_are_those_of_the_header() -> None:
    enums = re.findall(r"enum (\w+) : int32_t \{(.*?)\};", header(), re.DOTALL)
    assert len(enums) >= 8
    for name, body in enums:
        members = {key: int(value) for key, value in (re.findall(r"(\w+) = (-?\d+)", body))}
        assert len(members) == body.count("="), name
        mirror = getattr(abi, name)
        assert issubclass(mirror, IntEnum)
        assert members == {member.name: member.value for member in mirror}, name


def test_constants_and_fields_are_those_of_the_header() -> None:
    constants = dict(re.findall(r"constexpr \w+ (\w+) = (\d+);", header()))
    assert {"ABI_VERSION", "MAX_OPERANDS", "MAX_DIMS"} <= set(constants)
    for name, value in constants.items():
        assert getattr(abi, name) == int(value)
    for struct in (abi.Operand, abi.Dim, abi.Instr):
        body = re.search(rf"struct {struct.__name__} \{{(.*?)\}};", header(), re.DOTALL)
        assert body is not None
        fields = re.findall(r"\w+ (\w+)(?:\[\w+\])*;", body[1])
        assert fields == [name for name, *_ in struct._fields_]


def test_a_library_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (("instr", Instr), ("more", ctypes.c_int64))

    path = build.build_library()
    monkeypatch.setattr(abi, "Instr", Longer)
    told = rf"ABI {abi.ABI_VERSION} with \d+-byte instructions.*delete the file"
    with pytest.raises(BackendError, match=told):
        abi.NativeLibrary(path)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot load the native library"):
        abi.NativeLibrary(path)


@pytest.fixture
def tiny_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in a moment, in place of the kernels."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.h").write_text("int two();\n")
    (sources / "one.cpp").write_text(
        '#include "one.h"\n#include <cstdint>\nextern "C" int64_t go_abi_version() '
        "{ return two(); }\n"
    )
    (sources / "two.cpp").write_text('#include "one.h"\nint two() { return 2; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    return sources


def test_the_library_is_built_once_and_again_when_anything_changes(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = build.build_library(cache)
    assert ctypes.CDLL(str(first)).go_abi_version() == 2
    stamp = first.stat().st_mtime_ns
    started = time.perf_counter()
    assert build.build_library(cache) == first
    assert time.perf_counter() - started < 0.5
    assert first.stat().st_mtime_ns == stamp
    (tiny_sources / "two.cpp").write_text('#include "one.h"\nint two() { return 3; }\n')
    second = build.build_library(cache)
    assert second != first
    assert ctypes.CDLL(str(second)).go_abi_version() == 3
    monkeypatch.setattr(build, "_cpu_features", lambda: "another machine")
    third = build.build_library(cache)
    assert third not in (first, second)
    assert sorted(cache.glob("native/*")) == sorted([first, second, third])  # no leftovers


def test_further_flags_make_another_library(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHOPT_CXXFLAGS", raising=False)
    plain = build.build_library(tmp_path)
    (tiny_sources / "two.cpp").write_text(
        '#include "one.h"\n#ifndef ANSWER\n#define ANSWER 2\n#endif\nint two() { return ANSWER; }\n'
    )
    two = build.build_library(tmp_path)
    monkeypatch.setenv("GRAPHOPT_CXXFLAGS", "-DANSWER=5")
    five = build.build_library(tmp_path)
    assert len({plain, two, five}) == 3
    assert ctypes.CDLL(str(five)).go_abi_version() == 5
    assert build.build_library(tmp_path, extra=()) == two


def test_two_builders_at_once(tiny_sources: Path, tmp_path: Path) -> None:
    results: list[Path] = []
    builders = [
        threading.Thread(target=lambda: results.append(build.build_library(tmp_path / "cache")))
        for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(results) == 3
    assert len(set(results)) == 1
    assert list((tmp_path / "cache/native").iterdir()) == results[:1]


@pytest.mark.parametrize("damage", ["cut", "zeros at its end", "text", "empty", "no digest"])
def test_a_damaged_library_in_the_cache_is_built_anew(
    damage: str, tiny_sources: Path, tmp_path: Path
) -> None:
    path = build.build_library(tmp_path / "cache")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:1000],
            "zeros at its end": whole[:-200] + bytes(200),
            "text": b"not a library",
            "empty": b"",
            "no digest": whole[: -len(build._SEAL) - 32],
        }[damage]
    )
    assert not build.is_sound(path)
    assert build.build_library(tmp_path / "cache") == path
    assert build.is_sound(path)
    assert ctypes.CDLL(str(path)).go_abi_version() == 2


def test_what_a_killed_builder_left_is_removed(tiny_sources: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache/native/building-abc"
    left.mkdir(parents=True)
    (left / "one.o").write_bytes(b"half")
    path = build.build_library(tmp_path / "cache")
    assert list((tmp_path / "cache/native").iterdir()) == [path]


def test_without_a_compiler_the_library_of_another_machine_is_taken(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build_library(tmp_path / "cache")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build_library(tmp_path / "cache") == path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found"):
        build.build_library(tmp_path / "cache")


@pytest.mark.parametrize("place", ["file", "/proc/nothing", "name too long"])
def test_a_cache_folder_that_cannot_be_used(place: str, tiny_sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = {"file": tmp_path / "file", "name too long": tmp_path / ("x" * 300)}.get(
        place, Path(place)
    )
    with pytest.raises(BackendError, match=r"cannot be kept in .*GRAPHOPT_CACHE"):
        build.build_library(folder)


def test_compile_errors_quote_the_compiler(tiny_sources: Path, tmp_path: Path) -> None:
    (tiny_sources / "two.cpp").write_text("int two() { return missing_name; }\n")
    with pytest.raises(BackendError, match="missing_name"):
        build.build_library(tmp_path / "cache")
    assert list((tmp_path / "cache/native").iterdir()) == []


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found \(tried g\+\+, clang\+\+"):
        build.build_library(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="tried no-such-compiler"):
        build.build_library(tmp_path)


def test_cxx_names_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "my-compiler"
    mine.symlink_to(shutil.which("c++") or shutil.which("g++") or "missing")
    monkeypatch.setenv("CXX", str(mine))
    assert build.find_compiler() == str(mine)
    assert build.find_compiler("c++") == shutil.which("c++")


def test_the_default_folder_is_the_configured_cache(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "elsewhere"))
    assert build.build_library().parent == Config.from_environment().cache / "native"


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_count_is_checked(threads: int) -> None:
    with pytest.raises(BackendError, match="thread count must be 1 to 1024"):
        execute([], [], threads)


def negate(threads: int, n: int = 5000) -> None:
    """Two dependent instructions whose result is checked."""
    x = torch.randn(n)
    y, z = torch.full((n,), float("nan")), torch.full((n,), float("nan"))
    first, bases = instruction(Op.OP_UNARY, [y, x], [1, 1, 1, n], [[0, 0, 0, 1]] * 2, [1])
    second, _ = instruction(Op.OP_UNARY, [z, y], [1, 1, 1, n], [[0, 0, 0, 1]] * 2, [1])
    # Reversed reading makes each thread depend on what another one wrote.
    second.strides[1][3] = -1
    second.operands[1].offset = 4 * (n - 1)
    for operand in (0, 1):
        second.operands[operand].base += 2
    execute([first, second], [*bases[:2], z.data_ptr(), y.data_ptr()], threads)
    assert torch.equal(z, x.flip(0))


def test_barriers_order_dependent_instructions() -> None:
    for _ in range(50):
        for threads in (1, 2, 3, 8, 2):
            negate(threads)


def test_workers_wake_after_they_slept() -> None:
    for pause in (0.0, 0.002, 0.05):
        for _ in range(5):
            negate(2)
            time.sleep(pause)


def test_concurrent_callers_queue_up() -> None:
    failures: list[BaseException] = []

    def caller() -> None:
        try:
            for threads in (2, 3, 1, 4) * 20:
                negate(threads)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert failures == []


def test_a_run_releases_the_interpreter_lock() -> None:
    """Python code runs on while a plan executes."""
    n = 1 << 20
    x = torch.rand(n)
    one, bases = instruction(
        Op.OP_UNARY, [x, x], [1, 1, 1, n], [[0, 0, 0, 1]] * 2, [UnaryKind.UNARY_SIN]
    )
    runner = threading.Thread(target=lambda: execute([one] * 40, bases, 1))
    runner.start()
    turns = 0
    while runner.is_alive():
        turns += 1
        time.sleep(0.0005)
    runner.join()
    assert turns >= 10


def in_child(queue: multiprocessing.queues.Queue[str]) -> None:
    try:
        for threads in (1, 2, 3):
            negate(threads)
        queue.put("ok")
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_fork(busy: bool) -> None:
    """A child made after (or during) a run has no workers and makes its own."""
    negate(3)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            negate(2)

    other = threading.Thread(target=keep_busy)
    if busy:
        other.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            queue = context.Queue()
            child = context.Process(target=in_child, args=(queue,))
            child.start()
            try:
                assert queue.get(timeout=30) == "ok"
            finally:
                child.kill()
                child.join()
    finally:
        stop.set()
        if busy:
            other.join()
    negate(3)  # the parent is unharmed


def test_one_library_a_process() -> None:
    assert build.load_library() is build.load_library()
    x = torch.ones(3)
    call(Op.OP_UNARY, [x, x], [1, 1, 1, 3], [[0, 0, 0, 1]] * 2, [UnaryKind.UNARY_NEG])
    assert torch.equal(x, -torch.ones(3))
