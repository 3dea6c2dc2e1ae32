"""The ops, one folder each; see CONTRIBUTING.md for adding one."""

from .analog_bits import from_bits, to_bits
from .attention import attention, attention_with_lse
from .cross_attend import cross_attend
from .dct import blur, blur_denoise, blur_diffuse, dct, frequency_gain, idct
from .denoise_step import add_noise, denoise_step, denoise_step_with_x0, guide
from .fourier_cross_attend import fourier_cross_attend
from .geglu import geglu
from .group_norm_modulate import group_norm_modulate
from .layer_norm_modulate import gate_residual, gate_residual_norm_modulate, layer_norm_modulate
from .linear import linear
from .merge_attention import merge_attention
from .patch_embed import patch_embed, unpatch_project
from .patchify import depth_to_space, patchify, space_to_depth, unpatchify

__all__ = ["add_noise", "attention", "attention_with_lse", "blur", "blur_denoise", "blur_diffuse", "cross_attend", "dct", "denoise_step",
           "denoise_step_with_x0", "depth_to_space", "fourier_cross_attend", "frequency_gain", "from_bits", "gate_residual",
           "gate_residual_norm_modulate", "geglu", "group_norm_modulate", "guide", "idct", "layer_norm_modulate", "linear",
           "merge_attention", "patch_embed", "patchify", "space_to_depth", "to_bits", "unpatch_project", "unpatchify"]
