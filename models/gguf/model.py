"""A GGUF file as a ModelSource: a Hugging Face module with its tensors, packed or dense.

    GgufFile --build_config--> module (parameters on meta, buffers real)
       |                          |
       +--- one tensor at a time -+--> dense parameters assigned, packed ones beside the module

Contract: with weights="packed" the Q4_0, Q4_1 and Q8_0 matrices of linear and embedding layers
become `PackedWeight`s, exactly the file's codes and scales, and their parameters stay on the meta
device; every other tensor is dequantized to `dtype`. With weights="dense" all are. At no time does
more than one tensor exist in two forms. Buffers are computed by the module's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import dequantize
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from graphopt.capture.source import ModelSource
from graphopt.config import Config
from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.ir.weights import PackedWeight
from graphopt.models.gguf.blocks import PACKABLE, pack_blocks, take_rows
from graphopt.models.gguf.config import architecture_of, build_config, end_token_ids, gguf_names
from graphopt.models.gguf.file import GgufFile, GgufTensor
from graphopt.models.gguf.split import open_model
from graphopt.models.gguf.tokenizer import load_tokenizer
from graphopt.models.meta import meta_parameters
from graphopt.models.schema import short
from graphopt.models.weight_dtypes import narrowed


def load_gguf(
    path: Path,
    *,
    name: str,
    dtype: torch.dtype,
    weights: Literal["dense", "packed"],
    config: Config,
) -> ModelSource:
    """Load the GGUF file `path`, or all parts of the model it is one of.

    config: says where a converted tokenizer is kept.

    Raises WeightFormatError for a damaged file or one whose tensors do not fit its metadata,
    UnsupportedError for architectures, features and block types that are not supported.
    """
    file = open_model(path)
    hf_config, notes = build_config(file)
    with meta_parameters():
        module = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
    names = gguf_names(file, shapes)
    rows = _row_orders(file, hf_config)
    dense: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    for parameter, gguf_name in names.items():
        tensor = file.tensors[gguf_name]
        if tensor.shape != shapes[parameter]:
            raise WeightFormatError(
                f"tensor {gguf_name} of {path} has shape {tensor.shape}; the metadata make "
                f"{parameter} {shapes[parameter]}"
            )
        raw = file.read(tensor)
        order = next((rows[key] for key in rows if key in gguf_name), None)
        if weights == "packed" and tensor.type in PACKABLE and _is_matrix(module, parameter):
            weight = pack_blocks(raw, tensor.type)
            packed[parameter] = weight if order is None else take_rows(weight, order)
        else:
            value = _dense(raw, tensor)
            value = value if order is None else value[order]
            dense[parameter] = narrowed(value, dtype, gguf_name, tensor.path)
    _assign(module, dense)
    never = file.metadata.get("tokenizer.ggml.suppress_tokens")
    return ModelSource(
        module=module,
        name=name,
        packed=_with_tied_names(module, packed),
        tokenizer=load_tokenizer(file, config),
        eos_token_ids=end_token_ids(file),
        dtype=dtype,
        sampling={"suppress_tokens": never} if never else {},
        notes=(*notes, *_told(file, never)),
    )


def _told(file: GgufFile, never: list[int] | None) -> tuple[str, ...]:
    if not never:
        return ()
    return (
        f"{file.path.name}: tokenizer.ggml.suppress_tokens={short(never)}: default of generate",
    )


def _row_orders(file: GgufFile, config: PretrainedConfig) -> dict[str, Tensor]:
    """Part of a tensor's name -> for each Hugging Face row the file's row that holds it.

    llama.cpp stores the rows of a llama head as (first half, second half) interleaved, since it
    rotates neighbours; Hugging Face rotates column i with column i + head_dim/2.
    """
    if not architecture_of(file).permuted:
        return {}
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
    half = config.head_dim // 2
    return {
        key: torch.arange(count * config.head_dim).view(count, half, 2).transpose(1, 2).flatten()
        for key, count in heads.items()
    }


def _is_matrix(module: nn.Module, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(owner), nn.Linear | nn.Embedding)


def _dense(raw: NDArray[np.uint8], tensor: GgufTensor) -> Tensor:
    """Float32 tensor of the raw bytes."""
    try:
        return torch.from_numpy(dequantize(raw, tensor.type)).view(tensor.shape)
    except NotImplementedError:
        raise UnsupportedError(
            f"tensor {tensor.name} has block type {tensor.type.name}, which the gguf package "
            "cannot dequantize; convert the model to one of Q8_0, Q6_K, Q5_K, Q4_K, Q4_1, Q4_0, F16"
        ) from None


def _assign(module: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Make `dense` the module's parameters, keeping tied ones tied."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in dense.items():
        fresh = nn.Parameter(value)
        shared = [alias for alias, known in parameters.items() if known is parameters[name]]
        for alias in shared:
            owner, _, leaf = alias.rpartition(".")
            setattr(module.get_submodule(owner), leaf, fresh)


def _with_tied_names(
    module: nn.Module, packed: Mapping[str, PackedWeight]
) -> dict[str, PackedWeight]:
    """`packed` with every alias of a tied parameter naming the same weight."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        alias: packed[name]
        for name in packed
        for alias, known in parameters.items()
        if known is parameters[name]
    }
