"""Thirty-four Hugging Face architectures as tiny random models, with fresh inputs for each.

Hidden width 32, 2 layers, 99 tokens, at most 64 positions; layers that alternate (window and full,
chunked and full) come one of each, and windows are shorter than the inputs. Weights are drawn wide
enough for scores of order one: with the libraries' own initialisation (0.02) every softmax is
almost flat, and a wrong scale, cap or bias would not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

Kind = Literal["text", "encoder_decoder", "audio"]
MAX_POSITIONS = 64
VOCABULARY = 99
MEL_BINS, AUDIO_FRAMES = 8, 32
WINDOW_THEN_FULL = ("sliding_attention", "full_attention")
"""`layer_types` of the families whose layers alternate."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. The output that is compared is the model's first.

    config, model: names of the transformers classes; settings: arguments of the config.
    attentions: how many the model computes in one forward; encoder-decoders have self-attention
    in both halves and cross-attention. biased: how many of them add a learned bias, which is an
    operand of the attention on every road.
    """

    name: str
    config: str
    model: str
    settings: Mapping[str, Any] = field(repr=False)
    attentions: int = 2
    kind: Kind = "text"
    biased: int = 0

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, float32, on the CPU."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        model: PreTrainedModel = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    fan_in = parameter[0].numel()
                    parameter.normal_(0.0, 1.5 * fan_in**-0.5)
                elif "norm" in name and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.3)
        return model

    def inputs(self, batch: int, sequence: int, masked: bool) -> dict[str, Tensor]:
        """Fresh random arguments of `forward`; decoders get `sequence + 2` tokens.

        masked: with 2-D padding masks, rows in turn full, padded right, padded left.
        """
        ids = _ids(batch, sequence)
        if self.kind == "text":
            return {"input_ids": ids} | (
                {"attention_mask": padding(batch, sequence)} if masked else {}
            )
        target = sequence + 2
        inputs = {"decoder_input_ids": _ids(batch, target)}
        if self.kind == "audio":
            inputs["input_features"] = torch.randn(batch, MEL_BINS, AUDIO_FRAMES)
        else:
            inputs["input_ids"] = ids
            if masked:
                inputs["attention_mask"] = padding(batch, sequence)
        if masked:
            inputs["decoder_attention_mask"] = padding(batch, target)
        return inputs

    def axes(self, masked: bool) -> dict[str, dict[int, str]]:
        """Dynamic axes of each input: batch, sequence, and target for what the decoder reads."""
        axes: dict[str, dict[int, str]] = {}
        for name in self.inputs(2, 4, masked):
            axes[name] = {0: "batch"}
            if name != "input_features":
                axes[name][1] = "target" if name.startswith("decoder_") else "sequence"
        return axes

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`[batch, length]`: positions of the compared output that are no padding."""
        prefix = "" if self.kind == "text" else "decoder_"
        mask = inputs.get(f"{prefix}attention_mask")
        return torch.ones_like(inputs[f"{prefix}input_ids"]) == 1 if mask is None else mask == 1


def padding(batch: int, length: int) -> Tensor:
    """`[batch, length]` of int64: 1 where a token is; rows full, padded right, padded left."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        hidden = int(torch.randint(1, length // 2, ()))
        if row % 3 == 1:
            mask[row, length - hidden :] = 0
        elif row % 3 == 2:
            mask[row, :hidden] = 0
    return mask


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _decoder(name: str, prefix: str, config: str = "", **settings: Any) -> Family:
    return Family(
        name, config or f"{prefix}Config", f"{prefix}ForCausalLM", {**GROUPED, **settings}
    )


FAMILIES = (
    _decoder("llama", "Llama"),
    _decoder("qwen2", "Qwen2"),
    _decoder("qwen3", "Qwen3"),
    _decoder("mistral", "Mistral", sliding_window=5),
    _decoder("ministral", "Ministral", sliding_window=5, layer_types=list(WINDOW_THEN_FULL)),
    _decoder(
        "gemma2",
        "Gemma2",
        sliding_window=4,
        layer_types=list(WINDOW_THEN_FULL),
        query_pre_attn_scalar=12,
        attn_logit_softcapping=3.0,
    ),
    _decoder(
        "gemma3 text",
        "Gemma3",
        "Gemma3TextConfig",
        sliding_window=4,
        layer_types=list(WINDOW_THEN_FULL),
        query_pre_attn_scalar=12,
    ),
    _decoder("phi3", "Phi3", original_max_position_embeddings=MAX_POSITIONS),
    _decoder(
        "gpt_oss",
        "GptOss",
        sliding_window=4,
        layer_types=list(WINDOW_THEN_FULL),
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _decoder(
        "deepseek_v3",
        "DeepseekV3",
        num_key_value_heads=4,
        head_dim=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    Family(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    _decoder("olmo2", "Olmo2"),
    _decoder("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2),
    _decoder("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    _decoder(
        "qwen3_moe",
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    _decoder("cohere2", "Cohere2", sliding_window=4, layer_types=list(WINDOW_THEN_FULL)),
    _decoder(
        "llama4 text",
        "Llama4",
        "Llama4TextConfig",
        intermediate_size_mlp=48,
        num_local_experts=4,
        attention_chunk_size=4,
        no_rope_layers=[1, 0],
        floor_scale=4,
    ),
    _decoder("glm", "Glm"),
    Family("persimmon", "PersimmonConfig", "PersimmonForCausalLM", SIZES),
    _decoder("helium", "Helium"),
    _decoder("ernie4_5", "Ernie4_5"),
    _decoder("exaone4", "Exaone4", sliding_window=4, layer_types=list(WINDOW_THEN_FULL)),
    Family(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Family(
        "gpt_neo",
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Family(
        "falcon alibi",
        "FalconConfig",
        "FalconForCausalLM",
        {
            **SIZES,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "new_decoder_architecture": False,
            "parallel_attn": False,
        },
        # Slopes times positions in bfloat16, one number for each head and key.
        biased=2,
    ),
    Family(
        "xglm",
        "XGLMConfig",
        "XGLMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
    Family("bert", "BertConfig", "BertModel", SIZES),
    Family("albert", "AlbertConfig", "AlbertModel", {**SIZES, "embedding_size": 16}),
    Family(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
        },
        attentions=6,
        kind="encoder_decoder",
        biased=4,
    ),
    Family(
        "mbart",
        "MBartConfig",
        "MBartForConditionalGeneration",
        {**SEQ2SEQ, "max_position_embeddings": MAX_POSITIONS},
        attentions=6,
        kind="encoder_decoder",
    ),
    Family(
        "pegasus",
        "PegasusConfig",
        "PegasusForConditionalGeneration",
        {**SEQ2SEQ, "max_position_embeddings": MAX_POSITIONS},
        attentions=6,
        kind="encoder_decoder",
    ),
    Family(
        "whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": AUDIO_FRAMES // 2,
            "max_target_positions": MAX_POSITIONS,
        },
        attentions=6,
        kind="audio",
    ),
    Family("clip text", "CLIPTextConfig", "CLIPTextModel", SIZES),
    Family("siglip text", "SiglipTextConfig", "SiglipTextModel", SIZES),
)
BY_NAME = {family.name: family for family in FAMILIES}
