"""Small random models of many architectures that transformers ships; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "use_cache": False,
}
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "use_cache")}
MOE = {**TEXT, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _make_tokens(batch: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 256, (batch, 8), generator=generator)}


def _make_pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def _make_tokens_and_pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {**_make_tokens(batch, seed), **_make_pixels(batch, seed)}


def _make_pairs(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {**_make_tokens(batch, seed), "decoder_input_ids": _make_tokens(batch, seed + 100)["input_ids"]}


def _make_speech(batch: int, seed: int) -> dict[str, torch.Tensor]:
    features = torch.randn(batch, 16, 32, generator=torch.Generator().manual_seed(seed))
    return {"input_features": features, "decoder_input_ids": _make_tokens(batch, seed)["input_ids"]}


@dataclass(frozen=True)
class Architecture:
    """A model class, the options of its small configuration, and its inputs.

    Attributes:
        model: the model's class in transformers.
        config: the configuration's class.
        options: the configuration's arguments.
        make_inputs: keyword arguments of a batch size and a seed.
        reason: what torch.export says where it fails, as a regular expression; None where it works.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    make_inputs: Callable[[int, int], dict[str, torch.Tensor]] = _make_tokens
    reason: str | None = None

    def make_model(self) -> nn.Module:
        """The model with random weights, always the same, in evaluation mode."""
        torch.manual_seed(0)
        options = dict(self.options)
        experts_implementation = options.pop("experts_implementation", None)
        config = getattr(transformers, self.config)(**options)
        if experts_implementation:
            config._experts_implementation = experts_implementation
        return getattr(transformers, self.model)(config).eval()


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 32}),
    "Gemma": Architecture("GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 32}),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 32}),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", TEXT),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", {**TEXT, "pad_token_id": 0}),
    "Mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4}),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 128, "head_dim": 32},
    ),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 128, "n_layer": 1, "n_head": 4, "vocab_size": 256, "n_positions": 64, "use_cache": False},
    ),
    "OPT": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {**ENCODER, "ffn_dim": 256, "word_embed_proj_dim": 128, "use_cache": False},
    ),
    "BERT": Architecture("BertModel", "BertConfig", ENCODER),
    "DistilBERT": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 128, "hidden_dim": 256, "n_layers": 1, "n_heads": 4, "vocab_size": 256},
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 128,
            "d_ff": 256,
            "d_kv": 32,
            "num_layers": 1,
            "num_heads": 4,
            "vocab_size": 256,
            "use_cache": False,
        },
        _make_pairs,
    ),
    "ViT": Architecture("ViTModel", "ViTConfig", VISION, _make_pixels),
    "ConvNeXt": Architecture(
        "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [128, 256], "depths": [1, 1], "num_stages": 2}, _make_pixels
    ),
    "ResNet": Architecture(
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 128, "hidden_sizes": [128, 128], "depths": [1, 1], "layer_type": "basic"},
        _make_pixels,
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 128,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "vocab_size": 256,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        _make_speech,
    ),
    "CLIP": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**ENCODER, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 128},
        _make_tokens_and_pixels,
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 128, "state_size": 16, "num_hidden_layers": 1, "vocab_size": 256, "use_cache": False},
    ),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 128,
            "state_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": 256,
            "use_cache": False,
            "num_heads": 8,
            "head_dim": 32,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "Falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {
            **{
                k: TEXT[k]
                for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "use_cache")
            }
        },
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", {**ENCODER, "use_cache": False}),
    "Bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 128, "n_layer": 1, "n_head": 4, "vocab_size": 256, "use_cache": False},
    ),
    "DeBERTa v2": Architecture("DebertaV2Model", "DebertaV2Config", ENCODER),
    "Longformer": Architecture(
        "LongformerModel",
        "LongformerConfig",
        {**ENCODER, "attention_window": 4},
        reason="Could not guard on data-dependent expression",
    ),
    "BigBird": Architecture(
        "BigBirdModel",
        "BigBirdConfig",
        {**ENCODER, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    ),
    "Reformer": Architecture(
        "ReformerModel",
        "ReformerConfig",
        {
            "hidden_size": 128,
            "vocab_size": 256,
            "attn_layers": ["lsh"],
            "num_attention_heads": 2,
            "axial_pos_shape": [4, 2],
            "axial_pos_embds_dim": [64, 64],
            "feed_forward_size": 128,
            "is_decoder": False,
        },
        reason="ReformerDynamicCache.* in output, which is not a known type",
    ),
    "XLNet": Architecture(
        "XLNetModel",
        "XLNetConfig",
        {"d_model": 128, "n_layer": 1, "n_head": 4, "d_inner": 256, "vocab_size": 256, "use_mems_eval": False},
    ),
    "Mixtral (experts in a loop)": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**MOE, "num_local_experts": 4, "experts_implementation": "eager"},
        reason="Could not guard on data-dependent expression",
    ),
    "Mixtral (grouped products)": Architecture(
        "MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4, "experts_implementation": "grouped_mm"}
    ),
    "RecurrentGemma": Architecture(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {**TEXT, "num_hidden_layers": 3}
    ),
    "Jamba": Architecture(
        "JambaForCausalLM",
        "JambaConfig",
        {**TEXT, "num_hidden_layers": 2, "num_experts": 1, "use_mamba_kernels": False},
    ),
}
