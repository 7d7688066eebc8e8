import threading

import torch
from torch import nn

from graphopt.models.meta import meta_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.bias = nn.Linear(4, 4)
        self.register_parameter("none", None)
        self.register_buffer("steps", torch.arange(4.0))


def test_parameters_are_meta_and_buffers_real() -> None:
    with meta_parameters():
        module = Tied()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.bias.weight.shape == (4, 4)
    assert module.steps.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_tied_parameters_stay_one() -> None:
    with meta_parameters():
        module = Tied()
    assert module.head.weight is module.embed.weight


def test_frozen_parameters_stay_frozen() -> None:
    with meta_parameters():
        module = nn.Module()
        module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert module.frozen.is_meta
    assert not module.frozen.requires_grad


def test_nothing_is_left_behind() -> None:
    try:
        with meta_parameters():
            raise RuntimeError
    except RuntimeError:
        pass
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_are_not_touched() -> None:
    made: list[nn.Linear] = []
    with meta_parameters():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta
