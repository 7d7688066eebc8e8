"""The examples, and the code printed in the documentation, run as they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphopt.config import child_environment

ROOT = Path(__file__).parent.parent
PARTS = ("passes", "codegen", "runtime", "models")
NAMED_BLOCK = re.compile(r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVED = """
import torch
from torch import nn
from torch.nn import functional as F

import graphopt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids):
        x = self.embed(ids)
        heads = x[:, None]
        x = x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
        x = x + self.down(torch.square(F.relu(self.up(x))))
        return self.head(torch.square(x))


model = Model().eval()
ids = torch.randint(0, 50, (2, 9))
counts = {"fuse_relu_squared": 1, "graphopt.relu_squared": 1, "fuse_attention": 1}
program = graphopt.compile(model, ids, expect=counts, serving="required")
assert (program(ids) - model(ids)).abs().max() < 1e-5
(left,) = program.report.rejections("fuse_relu_squared")
assert left.code == "not-relu", left
hosted = program.executable.plan.host_steps
assert any("relu_squared" in step for step in hosted), hosted
print(len(program.generate([1, 2, 3], max_tokens=4)[0].tokens))
"""


def run(
    script: Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in another folder; its failure is the test's."""
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_compile_a_module(tmp_path: Path) -> None:
    printed = run(ROOT / "examples" / "compile_a_module.py", tmp_path).stdout
    assert "fuse_attention" in printed
    (difference,) = re.findall(r"largest difference to the model: (\S+)", printed)
    assert float(difference) < 1e-4


def test_write_a_pass(tmp_path: Path) -> None:
    printed = run(ROOT / "examples" / "write_a_pass.py", tmp_path).stdout
    assert "left alone: the operand is not negated (write_a_pass.py:" in printed
    assert "one double negation folded" in printed


def test_softmax_axis(tmp_path: Path) -> None:
    """The program and what graphopt says about it are those of the README."""
    script = ROOT / "examples" / "softmax_axis.py"
    readme = (ROOT / "README.md").read_text()
    said = re.findall(r"^```\n(fuse_attention: 0 of 1.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert said == [run(script, tmp_path).stdout]
    (program,) = re.findall(r"^class Weighted.*?^        return .*?\n", readme, re.M | re.S)
    assert program in script.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="what torch 2.13 computes")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_what_torch_compile_makes_of_the_softmax_axis(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^torch.compile: .*\n", (ROOT / "README.md").read_text(), re.MULTILINE)
    script = ROOT / "examples" / "softmax_axis.py"
    command = [sys.executable, str(script), "--inductor"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert printed.stdout.endswith(shown)


@pytest.mark.real_model
def test_chat(tmp_path: Path) -> None:
    assert "red" in run(ROOT / "examples" / "chat.py", tmp_path).stdout.lower()


@pytest.mark.slow
def test_wrong_rewrite(tmp_path: Path) -> None:
    """The rewrite that `graphopt bisect` finds is the one that the documentation prints."""
    script = str(ROOT / "examples" / "wrong_rewrite.py")
    main = "from graphopt.cli.app import main; main()"
    command = [sys.executable, "-c", main, "bisect", script, "--out", "case"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    text = (ROOT / "docs" / "debugging.md").read_text()
    (first,) = re.findall(r"^first bad rewrite: .*", text, re.MULTILINE)
    # Lines are wrapped at the width of the terminal, and line numbers are those of transformers.
    assert first.rpartition(":")[0] in " ".join(done.stdout.split())
    assert "relative error" in run(tmp_path / "case" / "reproduce.py", tmp_path / "case").stdout


def test_every_example_is_tested() -> None:
    scripts = {"compile_a_module.py", "write_a_pass.py", "chat.py", "wrong_rewrite.py"}
    tested = {*scripts, "softmax_axis.py", "graphopt_acme"}
    found = {path.name for path in (ROOT / "examples").iterdir()} - {"__pycache__"}
    assert found == tested


@pytest.mark.real_model
def test_the_python_of_the_readme(tmp_path: Path) -> None:
    _, block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme.py").write_text(block)
    assert "Paris" in run(tmp_path / "readme.py", tmp_path).stdout
    assert (tmp_path / "smollm2" / "manifest.json").exists()


def pytest_in(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def test_the_golden_tests_of_the_documentation(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "golden-tests.md").read_text()
    ((name, code),) = NAMED_BLOCK.findall(text)
    file = tmp_path / name
    file.write_text(code)
    accepted = pytest_in(tmp_path, "--accept")
    assert accepted.returncode == 0, accepted.stdout
    assert "2 golden graphs written, 0 unchanged" in accepted.stdout
    again = pytest_in(tmp_path)
    assert again.returncode == 0, again.stdout
    file.write_text(code.replace("functional.silu", "functional.gelu").replace("swiglu", "geglu"))
    changed = pytest_in(tmp_path)
    assert changed.returncode == 1, changed.stdout
    (message,) = re.findall(r"^```\n(the graph is .*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = [line.removeprefix("E").strip() for line in changed.stdout.splitlines()]
    for line in message.splitlines():
        assert any(line in found for found in shown), changed.stdout
    (by_hand,) = re.findall(r"^```\n(# Nobody.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "golden" / "dead.gir").write_text(by_hand)
    file.write_text("def test(golden_graph):\n    golden_graph.replay('dead', 'dead_code')\n")
    assert pytest_in(tmp_path, "--accept").returncode == 0
    after = (tmp_path / "golden" / "dead.gir").read_text().partition("=== after dead_code ===")[2]
    assert "aten.sin" in after
    assert "aten.cos" not in after


def test_the_op_and_the_pass_of_the_documentation(tmp_path: Path) -> None:
    """A copy of the package with the two documented files serves a model."""
    package = tmp_path / "site" / "graphopt"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "graphopt", package, ignore=ignore)
    for part in PARTS:
        shutil.copytree(ROOT / part, package / part, ignore=ignore)
    text = (ROOT / "docs" / "architecture.md").read_text()
    blocks = dict(NAMED_BLOCK.findall(text))
    assert sorted(blocks) == ["graphopt/ops/relu_squared.py", "passes/fuse/fuse_relu_squared.py"]
    for name, code in blocks.items():
        (package / name.removeprefix("graphopt/")).write_text(code)
    (tmp_path / "served.py").write_text(SERVED)
    environment = child_environment(PYTHONPATH=str(tmp_path / "site"))
    assert run(tmp_path / "served.py", tmp_path, environment).stdout == "4\n"


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, installed into a folder of its own."""
    scratch = tmp_path_factory.mktemp("acme")
    source, site = scratch / "source", scratch / "site"
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "examples" / "graphopt_acme", source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


def test_the_plugin_is_listed_with_its_origin(acme: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from graphopt.cli.app import main; main()", "passes"]
    environment = child_environment(PYTHONPATH=str(acme))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "fuse_relu_squared" in line]
    assert line.split()[2:4] == ["fuse", "exact"]
    assert line.split()[-2:] == ["default", "graphopt-acme"]
    listed = done.stdout
    assert listed.index("fuse_relu_squared") < listed.index("fuse_mlp")


def test_a_model_with_the_op_of_the_plugin_is_served(acme: Path, tmp_path: Path) -> None:
    """Compiled, saved and loaded; without the plugin the saved program says what is missing."""
    script = tmp_path / "served.py"
    script.write_text(
        SERVED.replace("graphopt.relu_squared", "acme.relu_squared")
        + 'program.save("saved")\n'
        + 'again = graphopt.load_program("saved")\n'
        + "assert torch.equal(again(ids), program(ids))\n"
    )
    environment = child_environment(PYTHONPATH=str(acme))
    assert run(script, tmp_path, environment).stdout == "4\n"
    (tmp_path / "load.py").write_text('import graphopt\ngraphopt.load_program("saved")\n')
    command = [sys.executable, str(tmp_path / "load.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "no installed plugin defines ops of the namespace 'acme'" in done.stderr


def test_the_tests_of_the_plugin(acme: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "graphopt_acme" / "tests", tmp_path / "tests")
    done = pytest_in(tmp_path, "tests", environment=child_environment(PYTHONPATH=str(acme)))
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
