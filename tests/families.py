"""A tiny random model of each family that effllm is meant for, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from conftest import tiny_gpt2, tiny_llama
from torch import Tensor, nn

VOCABULARY = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TEXT = {
    **VOCABULARY, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
VISION = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8}  # fmt: skip


def build(cls: str, config: str | None = None, **settings: Any) -> nn.Module:
    """A model of a transformers class in bfloat16 from the settings of its config class."""
    torch.manual_seed(0)
    values = getattr(transformers, config or cls.partition("For")[0] + "Config")(**settings)
    return getattr(transformers, cls)._from_config(values, dtype=torch.bfloat16).eval()


class PlainNet(nn.Module):
    """No transformers class: convolutions of every kind, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32, padding_mode="circular")
        self.grouped = nn.Conv2d(32, 64, 3, stride=2, groups=4, bias=False)
        self.signal = nn.Conv1d(64, 64, 3, groups=2)
        self.norm = nn.BatchNorm1d(64)
        self.mix = nn.Linear(64, 64)
        self.again = self.mix
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.stem(x)).relu()).flatten(2)
        return self.head(self.again(self.mix(self.norm(self.signal(x)).mean(-1)).relu()))


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return PlainNet().eval()


VISION_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 32, "patch_size": 8}  # fmt: skip
MOE = {**TEXT, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "llama, untied": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
    "opt": lambda: build("OPTForCausalLM", **VOCABULARY, hidden_size=128, ffn_dim=160, num_hidden_layers=2,
                         num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=256),
    "gpt_neox": lambda: build("GPTNeoXForCausalLM", **{k: v for k, v in TEXT.items() if k != "head_dim"}),
    "gemma3": lambda: build("Gemma3ForCausalLM", "Gemma3TextConfig", **TEXT, sliding_window=8),
    "gemma3n": lambda: build("Gemma3nForCausalLM", "Gemma3nTextConfig", **TEXT, vocab_size_per_layer_input=512,
                             hidden_size_per_layer_input=32, laurel_rank=8, num_kv_shared_layers=0),
    "gemma4": lambda: build("Gemma4ForCausalLM", "Gemma4TextConfig", **TEXT, vocab_size_per_layer_input=512,
                            hidden_size_per_layer_input=32, num_kv_shared_layers=0),
    "qwen3_5": lambda: build("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **{**TEXT, "num_hidden_layers": 4},
                             linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
                             linear_value_head_dim=16),
    "qwen3_5, images": lambda: build(
        "Qwen3_5ForConditionalGeneration",
        text_config={**TEXT, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 8,
                       "out_hidden_size": 128, "num_position_embeddings": 16},
        image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
    ),
    "gemma4, images": lambda: build(
        "Gemma4ForConditionalGeneration",
        text_config={**TEXT, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32},
        vision_config={**VISION_TOWER, "position_embedding_size": 16, "pooling_kernel_size": 2},
        audio_config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 64,
                      "subsampling_conv_channels": [16, 8]},
        image_token_id=500, audio_token_id=501, video_token_id=502, boi_token_id=503, eoi_token_id=504, boa_token_id=505,
        eoa_token_index=506,
    ),
    "mamba": lambda: build("MambaForCausalLM", **VOCABULARY, hidden_size=128, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: build("Mamba2ForCausalLM", **VOCABULARY, hidden_size=128, num_hidden_layers=2, state_size=16,
                            num_heads=8, head_dim=32, n_groups=1),
    "falcon_h1": lambda: build("FalconH1ForCausalLM", **TEXT, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32,
                               mamba_n_groups=1, mamba_d_state=16),
    "mixtral": lambda: build("MixtralForCausalLM", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: build("Qwen3MoeForCausalLM", **MOE, num_experts=4, mlp_only_layers=[0]),
    "gpt_oss": lambda: build("GptOssForCausalLM", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_5_moe": lambda: build("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", **{**MOE, "num_hidden_layers": 4},
                                 num_experts=4, shared_expert_intermediate_size=96, linear_num_key_heads=2,
                                 linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
    "deepseek_v3": lambda: build("DeepseekV3ForCausalLM", **{k: v for k, v in MOE.items() if k != "head_dim"},
                                 n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
                                 q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32),
    "t5": lambda: build("T5ForConditionalGeneration", **VOCABULARY, d_model=128, d_kv=32, d_ff=160, num_layers=2,
                        num_heads=4, decoder_start_token_id=0),
    "bert": lambda: build("BertForSequenceClassification", **VOCABULARY, hidden_size=128, intermediate_size=160,
                          num_hidden_layers=2, num_attention_heads=4),
    "resnet": lambda: build("ResNetForImageClassification", embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2],
                            layer_type="basic", num_labels=10),
    "mobilenet_v2": lambda: build("MobileNetV2ForImageClassification", image_size=32, num_labels=10,
                                  depth_multiplier=0.25),
    "convnext": lambda: build("ConvNextForImageClassification", hidden_sizes=[32, 64], depths=[2, 2], num_stages=2,
                              num_labels=10),
    "vit": lambda: build("ViTForImageClassification", **VISION, num_labels=10),
    "siglip": lambda: build("SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=VISION),
    "clip": lambda: build("CLIPModel", "CLIPConfig", text_config=TEXT, vision_config=VISION, projection_dim=64),
    "whisper": lambda: build("WhisperForConditionalGeneration", **VOCABULARY, d_model=128, encoder_layers=2,
                             decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=160,
                             decoder_ffn_dim=160, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
                             decoder_start_token_id=1),
    "llava": lambda: build("LlavaForConditionalGeneration", text_config={**TEXT, "model_type": "llama"},
                           vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=500),
    "qwen2_vl": lambda: build("Qwen2VLForConditionalGeneration", text_config={**TEXT, "rope_parameters":
                              {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}},
                              vision_config={"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128,
                              "patch_size": 8}, image_token_id=500),
    "plain module": plain_net,
}  # fmt: skip


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of one forward by name: text, images, sound, or images and text, as the model takes them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 257, (2, 17), generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    if not isinstance(model, transformers.PreTrainedModel):
        return {"x": images}
    kind = model.config.model_type
    if kind == "whisper":
        sound = torch.randn(2, 16, 40, generator=generator).to(model.dtype)
        return {"input_features": sound, "decoder_input_ids": tokens}
    if kind in ("siglip", "clip"):
        return {"input_ids": tokens, "pixel_values": images.to(model.dtype)}
    if kind == "llava":
        tokens = torch.cat([tokens, tokens[:, :5]], dim=1)
        tokens[:, 1:17] = 500
        return {"input_ids": tokens, "pixel_values": images.to(model.dtype)}
    if kind == "qwen2_vl":
        tokens[:, 1:5] = 500
        patches = torch.randn(32, 3 * 2 * 8 * 8, generator=generator).to(model.dtype)
        return {"input_ids": tokens, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
                "mm_token_type_ids": (tokens == 500).int()}  # fmt: skip
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images.to(model.dtype)}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of one forward (of a contrastive model, those of images against texts)."""
    if not isinstance(model, transformers.PreTrainedModel):
        return model(*inputs.values())
    out = model(**inputs)
    return out.logits if "logits" in out else out.logits_per_image
