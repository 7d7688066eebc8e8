"""The runtime: requests, blocks, scheduler, runner, sampler, engine."""

from graphopt.runtime.engine import Completion, Engine, EngineStats, TokenEvent
from graphopt.runtime.request import SamplingParams

__all__ = ["Completion", "Engine", "EngineStats", "SamplingParams", "TokenEvent"]
