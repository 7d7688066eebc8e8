"""Entry points: found once, named with their distribution, and a broken one says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.plugin_files import installed, pass_code, write_plugin

from graphopt import plugins
from graphopt.errors import PassError, PluginError
from graphopt.ir.opset import load_all
from graphopt.passes.base import Pass
from graphopt.passes.registry import all_passes, default_passes, origin


def test_a_module_that_registers_a_pass(tmp_path: Path) -> None:
    code = pass_code("fuse_module_plugin")
    write_plugin(tmp_path, "acme-module", "acme_module", code, "graphopt.passes")
    with installed(tmp_path):
        found = all_passes()["fuse_module_plugin"]
        assert origin(found) == "acme-module"
        assert "fuse_module_plugin" in default_passes()
        sys.modules.pop("acme_module")
        assert all_passes()["fuse_module_plugin"] is found
    assert "fuse_module_plugin" not in all_passes()


def test_a_pass_class(tmp_path: Path) -> None:
    code = pass_code("fuse_class_plugin").replace("@graphopt.register_pass\n", "")
    value = "acme_class:Found"
    write_plugin(tmp_path, "acme-class", "acme_class", code, "graphopt.passes", value)
    with installed(tmp_path):
        assert origin(all_passes()["fuse_class_plugin"]) == "acme-class"


def test_origins_of_other_passes() -> None:
    assert {origin(cls) for cls in all_passes().values()} == {"graphopt"}

    class Mine(Pass[int]):
        pass

    assert origin(Mine) == __name__


@pytest.mark.parametrize(
    ("module", "code", "value", "message"),
    [
        ("acme_bad1", "import no_such_module", "", "ModuleNotFoundError: No module named 'no_such"),
        ("acme_bad2", "1 / 0", "", "ZeroDivisionError"),
        ("acme_bad3", "x = 3", "acme_bad3:y", "AttributeError"),
        ("acme_bad4", "x = 3", "acme_bad4:x", "is a int, neither a module"),
        ("acme_bad5", pass_code("fuse_norm"), "", "two passes are called 'fuse_norm'"),
        ("acme_bad6", pass_code("fuse_x", "fusing"), "", "stages: cleanup, fuse"),
    ],
)
def test_a_broken_plugin_is_named(
    tmp_path: Path, module: str, code: str, value: str, message: str
) -> None:
    write_plugin(tmp_path, "acme-bad", module, code, "graphopt.passes", value)
    with installed(tmp_path):
        for _ in range(2):
            with pytest.raises(PassError) as error:
                all_passes()
            assert isinstance(error.value, PluginError)
            plugin = f"the plugin thing = {value or module!r} of acme-bad (graphopt.passes) "
            assert plugin in str(error.value)
            assert message in str(error.value)
    all_passes()


def test_both_origins_of_a_name_are_told(tmp_path: Path) -> None:
    code = pass_code("fuse_norm")
    write_plugin(tmp_path, "acme-norm", "acme_norm", code, "graphopt.passes")
    both = r"FuseNorm of graphopt and acme_norm\.Found of acme-norm"
    with installed(tmp_path), pytest.raises(PassError, match=both):
        all_passes()


def test_ops_are_a_group_of_their_own(tmp_path: Path) -> None:
    code = (
        "from graphopt.ir.opset import Cost, define\n"
        "SPEC = define('acmeops::half(Tensor x) -> Tensor', reference=lambda x: x / 2,\n"
        "              fake=lambda x: x.new_empty(x.shape), cost=lambda x: Cost(1.0, 1.0))\n"
    )
    write_plugin(tmp_path, "acme-ops", "acme_ops", code, "graphopt.ops")
    with installed(tmp_path):
        assert "acmeops.half" in load_all()
        assert plugins.origin("acme_ops.inner") == "acme-ops"
    # An op of torch stays defined as long as the process lives.
    assert "acmeops.half" in load_all()


def test_a_broken_op_plugin_is_named(tmp_path: Path) -> None:
    write_plugin(tmp_path, "acme-bad", "acme_bad_op", "x = 3", "graphopt.ops", "acme_bad_op:x")
    with installed(tmp_path), pytest.raises(PluginError, match=r"of acme-bad \(graphopt\.ops\) is"):
        load_all()


def test_a_plugin_that_ends_the_process_is_named(tmp_path: Path) -> None:
    write_plugin(tmp_path, "acme-exit", "acme_exit", "raise SystemExit(3)", "graphopt.ops")
    with installed(tmp_path), pytest.raises(PluginError, match=r"of acme-exit .*SystemExit: 3"):
        load_all()
