"""Models of torchvision, timm and transformers, small and with random weights: name -> a function that makes (module, inputs, loss)."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 4
Made = tuple[nn.Module, tuple[Any, ...], Callable[..., torch.Tensor] | None]

# -- images: (constructor's name, size of the image) ---------------------------------------------------------------------
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32, "googlenet": 64, "inception_v3": 75,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32,
    "resnet50": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11": 32, "vgg11_bn": 32,
    "vit_b_32": 32, "wide_resnet50_2": 32,
}  # fmt: skip
SEGMENTATION = {"deeplabv3_mobilenet_v3_large": 64, "fcn_resnet50": 32, "lraspp_mobilenet_v3_large": 64}
VIDEO = {"mc3_18": 32, "r3d_18": 32, "r2plus1d_18": 32, "s3d": 64, "swin3d_t": 32, "mvit_v2_s": 32}
TIMM = {
    "beit_base_patch16_224": 32, "bat_resnext26ts": 128, "botnet26t_256": 64, "cait_xxs24_224": 32, "coat_tiny": 32, "coatnet_pico_rw_224": 64,
    "convit_tiny": 32, "convmixer_768_32": 28, "convnext_atto": 32, "crossvit_tiny_240": 240, "cspresnet50": 32, "davit_tiny": 32,
    "deit_tiny_patch16_224": 32, "dla34": 32, "dpn48b": 32, "eca_resnet33ts": 64, "edgenext_xx_small": 32, "efficientformer_l1": 224,
    "efficientformerv2_s0": 224, "efficientvit_b0": 32, "eva02_tiny_patch14_224": 28, "fastvit_t8": 64, "focalnet_tiny_srf": 32, "gcvit_xxtiny": 224,
    "gernet_s": 32, "ghostnet_050": 32, "gmixer_12_224": 224, "gmlp_ti16_224": 224, "halonet26t": 128, "hardcorenas_a": 32, "hgnet_tiny": 32,
    "hgnetv2_b0": 32, "hiera_tiny_224": 224, "hrnet_w18_small": 64, "inception_next_atto": 32, "inception_resnet_v2": 80, "lambda_resnet26t": 64,
    "lcnet_035": 32, "levit_128s": 224, "maxvit_rmlp_pico_rw_256": 256, "mixer_s32_224": 224, "mobilenetv4_conv_small_035": 32, "mobileone_s0": 32,
    "mobilevit_xxs": 32, "mobilevitv2_050": 32, "mvitv2_tiny": 64, "nest_tiny": 224, "nextvit_small": 32, "nf_regnet_b0": 32, "pit_ti_224": 224,
    "poolformer_s12": 32, "poolformerv2_s12": 32, "pvt_v2_b0": 32, "regnetx_002": 32, "regnetz_005": 32, "repghostnet_050": 32, "repvgg_a0": 32,
    "repvit_m0_9": 32, "res2net50_26w_4s": 32, "resmlp_12_224": 224, "resnest14d": 64, "resnetv2_50": 32, "rexnet_100": 32, "samvit_base_patch16_224": 32,
    "selecsls42": 32, "semnasnet_050": 32, "sequencer2d_s": 224, "sehalonet33ts": 128, "shvit_s1": 64, "skresnet18": 32, "starnet_s1": 32,
    "swiftformer_xs": 32, "swinv2_cr_tiny_224": 224, "tf_efficientnet_b0": 32, "tiny_vit_5m_224": 32, "tnt_s_legacy_patch16_224": 32, "tresnet_m": 32,
    "twins_svt_small": 224, "vgg11": 32, "visformer_tiny": 224, "vit_tiny_patch16_224": 32, "vitamin_small_224": 32, "volo_d1_224": 224, "vovnet39a": 32,
    "xception41": 32, "xcit_nano_12_p16_224": 32, "csatv2": 32,
}  # fmt: skip


def images(size: int, *before: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, *before, size, size)


def total_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of all heads."""
    if isinstance(output, dict):
        output = tuple(output.values())
    heads = output if isinstance(output, tuple | list) else (output,)
    return sum(F.cross_entropy(h, target) for h in heads if h is not None and h.dim() > 1)  # type: ignore[return-value]


def torchvision_model(name: str, size: int) -> Made:
    import torchvision

    more = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {"image_size": size} if name == "vit_b_32" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **more), (images(size), torch.randint(10, (ROWS,))), total_loss


def segmentation_model(name: str, size: int) -> Made:
    import torchvision

    more = {} if name.startswith("lraspp") else {"aux_loss": True}
    module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **more)
    return module, (images(size), torch.randint(4, (ROWS, size, size))), total_loss


def video_model(name: str, size: int) -> Made:
    import torchvision

    frames = 16 if name in ("s3d", "mvit_v2_s") else 4
    more = {"spatial_size": (size, size), "temporal_size": 16} if name == "mvit_v2_s" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **more), (images(size, frames), torch.randint(10, (ROWS,))), total_loss


def timm_model(name: str, size: int) -> Made:
    """As shallow as its constructor allows."""
    import timm

    sizes: tuple[dict[str, Any], ...] = ({"img_size": size}, {})
    depths: tuple[dict[str, Any], ...] = ({"depth": 2}, {"layers": (1, 1, 1, 1)}, {"depths": (1, 1, 1, 1)}, {})
    for more in (s | d for s, d in itertools.product(sizes, depths)):
        with contextlib.suppress(TypeError, AssertionError, IndexError, ValueError):
            module = timm.create_model(name, num_classes=10, **more)
            break
    return module, (images(size), torch.randint(10, (ROWS,))), total_loss


# -- transformers: (task, model type) -> what its configuration needs besides TINY ----------------------------------------
TINY = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "num_labels": 3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
           "d_model": 16, "decoder_start_token_id": 1, "forced_eos_token_id": None}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VISION = {"image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "hidden_sizes": [8, 16], "window_size": 2, "patch_size": 4, "num_stages": 2,
          "hidden_size": ..., "num_attention_heads": ..., "num_hidden_layers": ...}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4}
MAMBA = {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 2, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 4}

CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {}, "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}, "gptj": {"rotary_dim": 4}, "gpt_neox": {},
    "gpt_bigcode": {}, "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "bloom": {}, "llama": {}, "mistral": {"sliding_window": 4}, "mixtral": EXPERTS,
    "qwen2": {}, "qwen2_moe": EXPERTS, "qwen3": {}, "qwen3_moe": EXPERTS, "gemma": {}, "gemma2": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4},
    "phi": {}, "phi3": {}, "falcon": {"head_dim": ...}, "codegen": {"rotary_dim": 4}, "cohere": {}, "olmo": {}, "olmo2": {}, "olmoe": EXPERTS, "stablelm": {},
    "starcoder2": {}, "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2}, "persimmon": {}, "glm": {"pad_token_id": 0}, "granite": {}, "granitemoe": EXPERTS,
    "jetmoe": EXPERTS | {"kv_channels": 4, "num_key_value_heads": 2},
    "deepseek_v2": EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}, "mamba": MAMBA, "mamba2": MAMBA,
    "falcon_mamba": MAMBA, "rwkv": {"attention_hidden_size": 16, "context_length": 32},
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 4, "num_hidden_layers": 3},
    "xglm": SEQ2SEQ | {"num_layers": 2, "attention_heads": 4, "ffn_dim": 32}, "biogpt": {}, "ctrl": {"dff": 32}, "nemotron": {},
    "gpt_oss": EXPERTS | {"sliding_window": 4},
    "bamba": MAMBA | {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1]},
    "jamba": EXPERTS | {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "distilbert": {"dim": 16, "n_heads": 4, "n_layers": 2, "hidden_dim": 32}, "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8}, "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "norm_rel_ebd": "layer_norm"}, "mpnet": {},
    "camembert": {}, "xlm-roberta": {}, "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "squeezebert": {"embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2,
        "output_groups": 2}, "convbert": {"embedding_size": 8, "conv_kernel_size": 3, "head_ratio": 2}, "roformer": {"embedding_size": 8},
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 8}, "fnet": {"type_vocab_size": 2}, "longformer": {"attention_window": [4, 4]},
    "big_bird": {"block_size": 4, "attention_type": "original_full"},
    "funnel": {"block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 32, "num_decoder_layers": 1, "num_hidden_layers": ...},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8}, "yoso": {"use_expectation": True},
    "xmod": {"languages": ["a"], "default_language": "a"}, "ibert": {}, "megatron-bert": {}, "ernie": {},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 3}, "xlm": {"emb_dim": 16, "n_heads": 4, "n_layers": 2},
    "flaubert": {"emb_dim": 16, "n_heads": 4, "n_layers": 2}, "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
}  # fmt: skip
TEXT2TEXT: dict[str, dict[str, Any]] = {
    "t5": T5, "umt5": T5, "longt5": T5 | {"local_radius": 2}, "bart": SEQ2SEQ, "mbart": SEQ2SEQ, "pegasus": SEQ2SEQ, "marian": SEQ2SEQ, "blenderbot": SEQ2SEQ,
    "blenderbot-small": SEQ2SEQ, "bigbird_pegasus": SEQ2SEQ | {"attention_type": "original_full"}, "plbart": SEQ2SEQ, "m2m_100": SEQ2SEQ,
    "led": SEQ2SEQ | {"attention_window": 4}, "fsmt": SEQ2SEQ | {"src_vocab_size": 64, "tgt_vocab_size": 64},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1, "disable_ngram_loss": True},
    "switch_transformers": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "num_experts": 4, "decoder_start_token_id": 0,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}  # fmt: skip
IMAGE: dict[str, dict[str, Any]] = {
    "vit": VISION, "beit": VISION, "swin": STAGES, "swinv2": STAGES, "convnext": STAGES, "convnextv2": STAGES, "resnet": STAGES,
    "regnet": STAGES | {"groups_width": 4}, "dinov2": VISION, "vit_msn": VISION, "poolformer": {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": 32, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25}, "mobilenet_v2": {"image_size": 32},
    "focalnet": STAGES | {"focal_levels": [1, 1], "focal_windows": [3, 3]},
}  # fmt: skip


def filled(module: nn.Module) -> nn.Module:
    """No dropout of whole layers: it is drawn from Python's numbers."""
    for m in module.modules():
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    return module


def transformers_model(task: str, kind: str, more: dict[str, Any]) -> Made:
    import transformers

    tiny = TINY | {"num_channels": 3, "head_dim": ...} if task == "image" else TINY
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in (tiny | more).items() if v is not ...})
    classes = {"causal": "CausalLM", "masked": "MaskedLM", "seq2seq": "Seq2SeqLM", "image": "ImageClassification"}
    module = filled(getattr(transformers, f"AutoModelFor{classes[task]}").from_config(config))
    transformers.integrations.moe._can_use_grouped_mm = lambda *_: False  # torch's own isn't there in float64
    if task == "image":
        size = getattr(config, "image_size", 32)
        return module, ({"pixel_values": images(size if isinstance(size, int) and size <= 64 else 32), "labels": torch.randint(3, (ROWS,))},), None
    ids = torch.randint(3, 64, (ROWS, 8))
    labels = ids.clone()
    labels[0, :3] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return module, ({"input_ids": ids, "attention_mask": mask, "labels": labels},), None


def whisper() -> Made:
    import transformers as t

    config = t.WhisperConfig(
        **(TINY | SEQ2SEQ), num_mel_bins=8, max_source_positions=8, max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None
    )
    return t.WhisperForConditionalGeneration(config), ({"input_features": torch.randn(ROWS, 8, 16), "labels": torch.randint(3, 64, (ROWS, 6))},), None


def wav2vec2() -> Made:
    import transformers as t

    convolutions = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = t.Wav2Vec2Config(**TINY, **convolutions, layerdrop=0.0, apply_spec_augment=False, classifier_proj_size=8, num_feat_extract_layers=2)
    return t.Wav2Vec2ForSequenceClassification(config), ({"input_values": torch.randn(ROWS, 96), "labels": torch.randint(3, (ROWS,))},), None


def clip() -> Made:
    import transformers as t

    small = {k: TINY[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    config = t.CLIPConfig(
        text_config=small | {"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2}, vision_config=small | VISION, projection_dim=8
    )
    ids = torch.randint(3, 64, (ROWS, 8))
    ids[:, -1] = 2
    return t.CLIPModel(config), ({"input_ids": ids, "pixel_values": images(32), "return_loss": True},), None


def xlnet() -> Made:
    import transformers as t

    config = t.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=32, num_labels=3, pad_token_id=0)
    return t.XLNetForSequenceClassification(config), ({"input_ids": torch.randint(3, 64, (ROWS, 8)), "labels": torch.randint(3, (ROWS,))},), None


def sam() -> Made:
    import transformers as t

    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "output_channels": 8, "mlp_dim": 32,
              "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 4}  # fmt: skip
    prompts = {"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    masks = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = t.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    return t.SamModel(config), ({"pixel_values": images(64), "input_points": torch.rand(ROWS, 1, 2, 2) * 64},), None


def detr() -> Made:
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return t.YolosForObjectDetection(t.YolosConfig(**small, image_size=[32, 32], patch_size=8, num_detection_tokens=4)), ({"pixel_values": images(32)},), None


Factory = Callable[[], Made]


def zoo() -> dict[str, Factory]:
    out: dict[str, Factory] = {}
    for task, table in {"causal": CAUSAL, "masked": MASKED, "seq2seq": TEXT2TEXT, "image": IMAGE}.items():
        out |= {f"hf/{task}/{kind}": functools.partial(transformers_model, task, kind, more) for kind, more in table.items()}
    out |= {f"hf/{fn.__name__}": fn for fn in (whisper, wav2vec2, clip, xlnet, sam, detr)}
    out |= {f"torchvision/{name}": functools.partial(torchvision_model, name, size) for name, size in TORCHVISION.items()}
    out |= {f"torchvision/{name}": functools.partial(segmentation_model, name, size) for name, size in SEGMENTATION.items()}
    out |= {f"torchvision/{name}": functools.partial(video_model, name, size) for name, size in VIDEO.items()}
    return out | {f"timm/{name}": functools.partial(timm_model, name, size) for name, size in TIMM.items()}
