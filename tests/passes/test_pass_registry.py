"""The order of passes: by stage, by what they declare, by name; and what cannot be ordered."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.plugin_files import installed, pass_code, write_plugin

import graphopt
from graphopt.config import child_environment
from graphopt.errors import PassError
from graphopt.passes.registry import all_passes, default_passes, ordered, register


def test_register_pass_is_public() -> None:
    assert graphopt.register_pass is register


def test_a_plugin_can_be_first_and_last_in_its_stage(tmp_path: Path) -> None:
    first = pass_code("zz_first", before=("fuse_attention", "fuse_mlp", "fuse_norm", "fuse_rope"))
    last = pass_code("aa_last", after=("merge_qkv",), before=("insert_kv_cache",))
    write_plugin(tmp_path, "acme-first", "acme_first", first, "graphopt.passes")
    write_plugin(tmp_path, "acme-last", "acme_last", last, "graphopt.passes")
    with installed(tmp_path):
        names = [cls.name for cls in ordered(all_passes())]
        fuse = [name for name in names if all_passes()[name].stage == "fuse"]
        assert (fuse[0], fuse[-1]) == ("zz_first", "aa_last")
        # What is not in the run does not matter.
        assert [cls.name for cls in ordered(["zz_first", "aa_last"])] == ["aa_last", "zz_first"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (pass_code("mine", after=("fuse_nrm",)), "after='fuse_nrm', .*did you mean 'fuse_norm'"),
        (pass_code("mine", before=("fuse_nrm",)), "before='fuse_nrm', .*did you mean 'fuse_norm'"),
        (pass_code("mine", requires=("fuse_nrm",)), "requires='fuse_nrm', .*mean 'fuse_norm'"),
        (pass_code("mine", requires=("fuse_norm",)), "requires 'fuse_norm', which is not in this"),
        (
            pass_code("mine", after=("insert_kv_cache",)),
            r"\(fuse\) is declared after 'insert_kv_cache', .* later stage 'cache'",
        ),
        (
            pass_code("mine", before=("dead_code",)),
            r"\(fuse\) is declared before 'dead_code', .* earlier stage 'cleanup'",
        ),
    ],
)
def test_declarations_that_cannot_be_kept(tmp_path: Path, code: str, message: str) -> None:
    write_plugin(tmp_path, "acme-mine", "acme_mine", code, "graphopt.passes")
    with installed(tmp_path), pytest.raises(PassError, match=message) as error:
        ordered([name for name in all_passes() if name != "fuse_norm"])
    assert "pass 'mine' of acme-mine" in str(error.value)


def test_a_cycle_names_the_passes_and_the_plugin(tmp_path: Path) -> None:
    code = pass_code("mine", after=("merge_qkv",), before=("fuse_norm",))
    write_plugin(tmp_path, "acme-cycle", "acme_cycle", code, "graphopt.passes")
    with installed(tmp_path), pytest.raises(PassError, match="wait for each other") as error:
        ordered([*default_passes(), "merge_qkv"])
    cycle = re.findall(r"'(\w+)'", str(error.value))
    assert cycle[0] == cycle[-1]
    assert set(cycle) == {"mine", "fuse_norm", "merge_qkv"}
    assert "'mine' of acme-cycle" in str(error.value)


@pytest.mark.parametrize("stage", ["fuze", None])
def test_a_stage_that_does_not_exist(stage: str | None) -> None:
    class Mine:
        name = "mine"

    Mine.stage = stage  # type: ignore[attr-defined]
    message = "did you mean 'fuse'" if stage else "has stage None; stages: cleanup, fuse"
    with pytest.raises(PassError, match=message):
        register(Mine)  # type: ignore[type-var]
    assert "mine" not in all_passes()


def test_loading_passes_makes_no_second_object_of_an_op() -> None:
    """What was imported before would recognise none of the ops that are captured afterwards."""
    code = (
        "import torch\n"
        "packets = [getattr(torch.ops.aten, name) for name in torch.ops.aten]\n"
        "def ops():\n"
        "    return [getattr(p, o) for p in packets for o in p.overloads()]\n"
        "from graphopt.ir.opset import load_all\n"
        "before = ops()\n"
        "from graphopt.passes.registry import all_passes\n"
        "load_all(), all_passes()\n"
        "import graphopt.program.program\n"
        "assert len(before) > 300\n"
        "assert all(a is b for a, b in zip(before, ops(), strict=True))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=child_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
