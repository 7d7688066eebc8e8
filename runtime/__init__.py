"""The runtime: requests, blocks, scheduler, runner, sampler, engine."""

from graphopt.runtime.engine import Engine
from graphopt.runtime.request import SamplingParams
from graphopt.runtime.results import Completion, EngineStats, TokenEvent

__all__ = ["Completion", "Engine", "EngineStats", "SamplingParams", "TokenEvent"]
