from pathlib import Path

import pytest

from graphopt.config import Config, child_environment
from graphopt.errors import UnsupportedError


def test_defaults() -> None:
    config = Config.from_environment({})
    assert config.cache == Path.home() / ".cache" / "graphopt"
    assert not config.offline


def test_cache_is_expanded() -> None:
    assert Config.from_environment({"GRAPHOPT_CACHE": "~/x"}).cache == Path.home() / "x"


@pytest.mark.parametrize(
    ("text", "offline"),
    [("1", True), ("TRUE", True), ("on ", True), ("0", False), ("", False), ("no", False)],
)
def test_offline(text: str, offline: bool) -> None:
    assert Config.from_environment({"GRAPHOPT_OFFLINE": text}).offline is offline


def test_neither_on_nor_off() -> None:
    with pytest.raises(UnsupportedError, match="GRAPHOPT_OFFLINE='maybe'"):
        Config.from_environment({"GRAPHOPT_OFFLINE": "maybe"})


def test_child_environment_adds_to_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "a")
    monkeypatch.setenv("CHANGED", "b")
    environment = child_environment(CHANGED="c")
    assert (environment["KEPT"], environment["CHANGED"]) == ("a", "c")


def test_the_home_of_an_unknown_user() -> None:
    with pytest.raises(UnsupportedError, match="GRAPHOPT_CACHE='~no-such-user/x' names no folder"):
        Config.from_environment({"GRAPHOPT_CACHE": "~no-such-user/x"})


def test_flags_of_the_compiler_are_split_as_a_shell_does() -> None:
    config = Config.from_environment({"GRAPHOPT_CXXFLAGS": "-O1 '-DNAME=two words'"})
    assert config.cxxflags == ("-O1", "-DNAME=two words")
    assert Config.from_environment({}).cxxflags == ()
    with pytest.raises(UnsupportedError, match=r"GRAPHOPT_CXXFLAGS=.* cannot be split"):
        Config.from_environment({"GRAPHOPT_CXXFLAGS": "-O1 '"})
