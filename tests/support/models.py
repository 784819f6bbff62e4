"""Tiny models of transformers, with random weights, and inputs for them."""

import torch
import transformers

BATCH, LENGTH, WINDOW = 2, 10, 4
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SEQ2SEQ = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
CONFIGS = {
    "bert": {**SIZES, **TOKENS},
    "roberta": {**SIZES, **TOKENS},
    "modernbert": {**SIZES, **TOKENS, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "gemma2": {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gpt_oss": {**GROUPED, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": {**TOKENS, "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "deepseek_v3": {
        **SIZES,
        **TOKENS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 2,
        "n_routed_experts": 8,
    },
    "t5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": {**TOKENS, **SEQ2SEQ, "vocab_size": 99, "d_model": 32, "max_position_embeddings": 64},
    "whisper": {
        **TOKENS,
        **SEQ2SEQ,
        "vocab_size": 99,
        "d_model": 32,
        "num_mel_bins": 8,
        "max_source_positions": 15,
        "max_target_positions": 32,
        "decoder_start_token_id": 3,
    },
    "vit": {**SIZES, "image_size": 16, "patch_size": 4},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
}
PLAIN = {name: size for name, size in SIZES.items() if name != "vocab_size"}

# Left out of the comparison with eager, which would say the same again; compiled, all are tried.
MORE = {
    "albert": {**SIZES, **TOKENS, "embedding_size": 16},
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0},
    "electra": {**SIZES, **TOKENS, "embedding_size": 16},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": GROUPED,
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma": GROUPED,
    "gemma3_text": {**GROUPED, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**GROUPED, "sliding_window": WINDOW},
    "gpt_neox": {**SIZES, **TOKENS},
    "opt": {**TOKENS, "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
            "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "llama4_text": {**GROUPED, "num_local_experts": 2, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48,
                    "no_rope_layers": [1, 0]},
    "cohere2": {**GROUPED, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {**GROUPED, "attention_multiplier": 0.3},
    "olmo2": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": WINDOW},
    "dinov2": {**PLAIN, "image_size": 16, "patch_size": 4},
    "siglip_vision_model": {**PLAIN, "image_size": 16, "patch_size": 4},
    "clip_text_model": {**SIZES, **TOKENS, "max_position_embeddings": 64},
    "wav2vec2": {**SIZES, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4),
                 "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}  # fmt: skip
VISION = ("vit", "swin", "dinov2", "siglip_vision_model")
SEQ2SEQ_MODELS = ("t5", "bart")
WITHOUT_PADDING = (*VISION, "whisper")


def build(name, auto=transformers.AutoModel):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**CONFIGS, **MORE}[name])
    return auto.from_config(config, attn_implementation="eager").eval()


def text(padding):
    """(token ids, attention mask or None) [BATCH, LENGTH]."""
    ids = torch.randint(3, 99, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding == "unpadded":
        return ids, None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :3] = padding != "left"
    mask[1, 7:] = padding != "right"
    return ids.masked_fill(mask == 0, 0), mask


def model_inputs(name, padding):
    ids, mask = text(padding)
    if name in VISION:
        size = {**CONFIGS, **MORE}[name]["image_size"]
        return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))}
    if name == "wav2vec2":
        samples = torch.randn(BATCH, 320, generator=torch.Generator().manual_seed(1))
        if mask is None:
            return {"input_values": samples}
        keep = torch.ones(BATCH, 320, dtype=torch.long)
        keep[1, 200:] = 0
        return {"input_values": samples * keep, "attention_mask": keep}
    if name == "whisper":
        features = torch.randn(BATCH, 8, 30, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "decoder_input_ids": ids[:, :6]}
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids[:, :6]} if name in SEQ2SEQ_MODELS else inputs


def tokens_of(model, name, inputs, length):
    """Bool [BATCH, length]: the outputs that are no padding, whose own are arbitrary."""
    mask = inputs.get("attention_mask")
    if mask is None or name in SEQ2SEQ_MODELS:
        return torch.ones(BATCH, length, dtype=torch.bool)
    return (model._get_feature_vector_attention_mask(length, mask) if name == "wav2vec2" else mask).bool()
