"""The ops, one folder each; see CONTRIBUTING.md for adding one."""

from .attention import attention, attention_with_lse
from .cross_attend import cross_attend
from .dct import blur, blur_denoise, blur_diffuse, dct, frequency_gain, idct
from .fourier_cross_attend import fourier_cross_attend
from .geglu import geglu
from .group_norm_modulate import group_norm_modulate
from .layer_norm_modulate import gate_residual, gate_residual_norm_modulate, layer_norm_modulate
from .linear import linear
from .merge_attention import merge_attention
from .patch_embed import patch_embed, unpatch_project
from .patchify import depth_to_space, patchify, space_to_depth, unpatchify

__all__ = ["attention", "attention_with_lse", "blur", "blur_denoise", "blur_diffuse", "cross_attend", "dct", "depth_to_space",
           "fourier_cross_attend", "frequency_gain", "gate_residual", "gate_residual_norm_modulate", "geglu", "group_norm_modulate", "idct",
           "layer_norm_modulate", "linear", "merge_attention", "patch_embed", "patchify", "space_to_depth", "unpatch_project", "unpatchify"]
