"""Weights from disk: the authors' released checkpoints, loaded strictly, and our models under the released names.

Nothing is ever filled in silently: every parameter gets a tensor, every tensor of the file a parameter, or the error
lists the names. The only tensors passed over are those that the released forward never reads (`UNREAD`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mage_core.mage import MAGE, MAGEConfig
from mage_core.vqvae import VQVAE, VQVAEConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: names the file, the rule and the remedy."""


# ---------------------------------------------------------------- names

UNREAD = (r"ma_encoder\.blocks\.\d+\.ln_(q|kv)\.(weight|bias)", r".*\.num_batches_tracked")

_PARTS = ("weight", "bias", "running_mean", "running_var")

_VQVAE_NAMES = (
    (r"codebook", r"codebook.embedding.weight"),
    (r"(encoder|decoder)\.(\d+)\.residual\.(\d+)\.(\w+)", r"\1.\2.block.\3.\4"),
    (r"(encoder|decoder)\.(\d+)\.skip\.(\w+)", r"\1.\2.id_path.\3"),
    (r"(encoder|decoder)\.(\d+)\.(\w+)", r"\1.\2.\3"),
)

_MAGE_NAMES = (
    (r"visual_tokens\.embedding", r"visual_token_embedding.weight"),
    (r"visual_tokens\.convolution\.weight", r"conv.0.weight"),
    (r"visual_tokens\.row_positions", r"H_positional_embedding"),
    (r"visual_tokens\.column_positions", r"W_positional_embedding"),
    (r"text_encoder\.words", r"text_encoder.token_embedding.weight"),
    (r"text_encoder\.positions", r"text_encoder.positions.weight"),
    (r"text_encoder\.norm\.(\w+)", r"text_encoder.layer_norm.\1"),
    (r"text_encoder\.final_norm\.(\w+)", r"text_encoder.ln_text_final.\1"),
    (r"text_encoder\.projection\.(\w+)", r"text_encoder.text_projection.\1"),
    (r"text_encoder\.layers\.(\d+)\.qkv\.(\w+)", r"text_encoder.transformer.layers.\1.self_attn.in_proj_\2"),
    (r"text_encoder\.layers\.(\d+)\.out\.(\w+)", r"text_encoder.transformer.layers.\1.self_attn.out_proj.\2"),
    (r"text_encoder\.layers\.(\d+)\.norm_([12])\.(\w+)", r"text_encoder.transformer.layers.\1.norm\2.\3"),
    (r"text_encoder\.layers\.(\d+)\.up\.(\w+)", r"text_encoder.transformer.layers.\1.linear1.\2"),
    (r"text_encoder\.layers\.(\d+)\.down\.(\w+)", r"text_encoder.transformer.layers.\1.linear2.\2"),
    (r"motion_anchor\.layers\.(\d+)\.qkv\.(\w+)", r"ma_encoder.blocks.\1.attn.in_proj_\2"),
    (r"motion_anchor\.layers\.(\d+)\.out\.(\w+)", r"ma_encoder.blocks.\1.attn.out_proj.\2"),
    (r"motion_anchor\.layers\.(\d+)\.norm\.(\w+)", r"ma_encoder.blocks.\1.ln_2.\2"),
    (r"motion_anchor\.layers\.(\d+)\.mlp\.up\.(\w+)", r"ma_encoder.blocks.\1.mlp.c_fc.\2"),
    (r"motion_anchor\.layers\.(\d+)\.mlp\.down\.(\w+)", r"ma_encoder.blocks.\1.mlp.c_proj.\2"),
    (r"motion_anchor\.speed", r"speed_embedding"),
    (r"motion_anchor\.adain\.widen\.weight", r"conv_d2.weight"),
    (r"motion_anchor\.adain\.scale\.(\d+)\.(\w+)", r"adain.conv_mu.\1.\2"),
    (r"motion_anchor\.adain\.shift\.(\d+)\.(\w+)", r"adain.conv_var.\1.\2"),
    (r"posterior\.blocks\.(\d+)\.conv_([12])\.weight", r"conv3d.\1.conv\2.weight"),
    (r"posterior\.blocks\.(\d+)\.norm_([12])\.(\w+)", r"conv3d.\1.bn\2.\3"),
    (r"posterior\.blocks\.(\d+)\.shortcut\.([01])\.(\w+)", r"conv3d.\1.downsample.\2.\3"),
    (r"posterior\.mean\.(\w+)", r"conv_mu2.\1"),
    (r"posterior\.log_variance\.(\w+)", r"conv_var2.\1"),
    (r"generator\.time_positions", r"generate_model.T_positional_embedding"),
    (r"generator\.anchor_in\.(\w+)", r"generate_model.context_linear.\1"),
    (r"generator\.frames_in\.(\w+)", r"generate_model.in_linear.\1"),
    (r"generator\.logits\.(\w+)", r"generate_model.out.\1"),
    (r"generator\.layers\.(\d+)\.qkv\.(\w+)", r"generate_model.blocks.\1.attn.in_proj_\2"),
    (r"generator\.layers\.(\d+)\.out\.(\w+)", r"generate_model.blocks.\1.attn.out_proj.\2"),
    (r"generator\.layers\.(\d+)\.norm_([12])\.(\w+)", r"generate_model.blocks.\1.ln_\2.\3"),
    (r"generator\.layers\.(\d+)\.mlp\.up\.(\w+)", r"generate_model.blocks.\1.mlp.c_fc.\2"),
    (r"generator\.layers\.(\d+)\.mlp\.down\.(\w+)", r"generate_model.blocks.\1.mlp.c_proj.\2"),
)


def released_names(names: Iterable[str], rules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Our parameter names -> the released ones; KeyError for a name without a released counterpart."""
    table = {}
    for name in names:
        for ours, theirs in rules:
            match = re.fullmatch(ours, name)
            if match:
                table[name] = match.expand(theirs)
                break
        else:
            raise KeyError(name)
    return table
