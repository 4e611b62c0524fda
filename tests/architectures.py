"""A tiny random model of every architecture that the README says is tested, and its outputs on fixed inputs."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

TOKENS = 96
IDS = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {**IDS, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
SOME_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
BART = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}


class Architecture(NamedTuple):
    """Which classes of transformers, and the settings that make the model tiny."""

    model: str
    config: str
    settings: dict[str, Any]


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
    "Llama, tied": Architecture("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", LLAMA),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8}),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    "Gemma 3, multimodal": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**LLAMA, "head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
            "boi_token_index": 94,
            "eoi_token_index": 93,
        },
    ),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", {**BERT, "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-J": Architecture("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "CodeGen": Architecture("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "OPT": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **IDS,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "Falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "BLOOM": Architecture("BloomForCausalLM", "BloomConfig", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "StableLM": Architecture("StableLmForCausalLM", "StableLmConfig", LLAMA),
    "OLMo 2": Architecture("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "Mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 11, "num_experts_per_tok": 2}
    ),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**LLAMA, **SOME_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LLAMA, **SOME_EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "OLMoE": Architecture("OlmoeForCausalLM", "OlmoeConfig", {**LLAMA, **SOME_EXPERTS}),
    "DeepSeek-V3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "Mamba": Architecture(
        "MambaForCausalLM", "MambaConfig", {**IDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "BART": Architecture("BartForConditionalGeneration", "BartConfig", BART),
    "BERT": Architecture("BertForMaskedLM", "BertConfig", BERT),
    "BERT, classifier": Architecture("BertForSequenceClassification", "BertConfig", BERT),
    "RoBERTa": Architecture("RobertaForMaskedLM", "RobertaConfig", BERT),
    "ModernBERT": Architecture(
        "ModernBertForMaskedLM", "ModernBertConfig", {**BERT, "bos_token_id": 1, "eos_token_id": 2}
    ),
    "DistilBERT": Architecture(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": TOKENS,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "ELECTRA": Architecture("ElectraForPreTraining", "ElectraConfig", {**BERT, "embedding_size": 16}),
    "ViT": Architecture("ViTForImageClassification", "ViTConfig", VISION),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, norms and biases included, so that no tensor is neutral."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    model: PreTrainedModel = getattr(transformers, architecture.model)(config).eval()
    return moved(model, seed, 0.05)


def moved(model: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """A copy with every weight shrunk and normal noise added, tied ones together: a fine-tune.

    Without the shrinking base + difference would be the fine-tune's weight exactly.
    """
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.9).add_(size * torch.randn(parameter.shape, generator=generator))
    return copied


@torch.inference_mode()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """The logits of one call on fixed ids or pixels."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values" and model.config.model_type == "vit":
        size = model.config.image_size
        return model(pixel_values=torch.randn(2, 3, size, size, generator=generator)).logits
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    return model(input_ids=ids).logits
