"""An image to tokens and tokens to an image, as diffusion transformers begin and end."""

from math import prod

import torch
from torch import nn

from ..ops import depth_to_space, patch_embed, space_to_depth, unpatch_project

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _load(made, pairs, like):
    with torch.no_grad():
        for mine, theirs in pairs:
            if mine is not None:
                mine.copy_(theirs)
    return made.to(like)


class PatchEmbed(nn.Module):
    """W (elements of a patch) + bias, and + a position table: a convolution whose stride is its kernel, without its layout.

    Shapes   image (B, channels, *space), `axes` axes (1 to 3) that the patch divides -> (B, N, dim), row-major over the grid
    Options  patch: an int or one per axis; bias: of the projection; position: the table (N, dim), fixed; the image's grid must then have N
             patches
    State    proj: nn.Conv1d to nn.Conv3d, as timm's, DiT's and diffusers' PatchEmbed; pos_embed (1, N, dim), absent without position
    Source   Dosovitskiy et al. 2021, equation 1; Peebles & Xie 2023, section 3.2
    """

    def __init__(self, channels, dim, patch, *, axes=2, bias=True, position=None):
        super().__init__()
        self.proj = _CONVOLUTIONS[axes](channels, dim, patch, patch, bias=bias)
        self.register_buffer("pos_embed", None if position is None else position.detach().clone().unsqueeze(0))

    def forward(self, image):
        position = None if self.pos_embed is None else self.pos_embed[0]
        return patch_embed(image, self.proj.weight.flatten(1), self.proj.bias, position, patch=self.proj.kernel_size, order="cpq")

    @classmethod
    def _from(cls, op, module, position):
        proj = module.proj
        plain = dict(stride=proj.kernel_size, padding=(0,) * len(proj.kernel_size), dilation=(1,) * len(proj.kernel_size), groups=1)
        given = {name: getattr(proj, name) for name in plain}
        if given != plain:
            raise ValueError(f"{op}: module wants a projection with {plain}, got {given}")
        made = cls(proj.in_channels, proj.out_channels, proj.kernel_size, axes=len(proj.kernel_size), bias=proj.bias is not None,
                   position=position)
        return _load(made, ((made.proj.weight, proj.weight), (made.proj.bias, proj.bias)), proj.weight)

    @classmethod
    def from_timm(cls, module):
        """A `timm.layers.PatchEmbed` (ViT's and DiT's), whose positions are the model's own; weights are copied.

        Raises   ValueError for a module that keeps the grid, pads, or has a norm
        """
        given = dict(flatten=module.flatten, norm=type(module.norm).__name__, dynamic_img_pad=getattr(module, "dynamic_img_pad", False))
        if given != dict(flatten=True, norm="Identity", dynamic_img_pad=False):
            raise ValueError(f"from_timm: module wants flattened tokens, no norm and no padding, got {given}")
        return cls._from("from_timm", module, None)

    @classmethod
    def from_dit(cls, model):
        """A DiT's `x_embedder`, a timm PatchEmbed, with the model's `pos_embed` (1, N, dim) as its positions; weights are copied.

        Raises   ValueError as from_timm
        """
        made = cls.from_timm(model.x_embedder)
        made.register_buffer("pos_embed", model.pos_embed.detach().clone())
        return made

    @classmethod
    def from_diffusers(cls, module):
        """A `diffusers.models.embeddings.PatchEmbed`, with its positions if it has any; weights are copied.

        Raises   ValueError for a module that keeps the grid, has a norm, or crops its positions
        """
        given = dict(flatten=module.flatten, norm=module.norm is not None, pos_embed_max_size=getattr(module, "pos_embed_max_size", None))
        if given != dict(flatten=True, norm=False, pos_embed_max_size=None):
            raise ValueError(f"from_diffusers: module wants flattened tokens, no norm and whole positions, got {given}")
        position = getattr(module, "pos_embed", None)
        return cls._from("from_diffusers", module, None if position is None else position[0])


class Unpatch(nn.Module):
    """W token + bias, put back as a patch of the image.

    Shapes   tokens (B, N, dim), grid one int per axis with product N -> (B, channels, *(grid * patch))
    Options  patch: an int or one per axis; bias: of the projection; order: of the projection's rows, "pqc" (DiT) or "cpq"
    State    linear: nn.Linear(dim, prod(patch) * channels), as in DiT's final layer
    Source   Peebles & Xie 2023, section 3.2
    """

    def __init__(self, dim, channels, patch, *, axes=2, bias=True, order="pqc"):
        super().__init__()
        self.patch, self.order = (patch,) * axes if isinstance(patch, int) else tuple(patch), order
        self.linear = nn.Linear(dim, prod(self.patch) * channels, bias)

    def forward(self, tokens, grid):
        return unpatch_project(tokens, self.linear.weight, self.linear.bias, patch=self.patch, grid=grid, order=self.order)

    def extra_repr(self):
        return f"patch={self.patch}, order={self.order}"

    @classmethod
    def from_linear(cls, linear, patch, *, axes=2, order="pqc"):
        """A model's last projection: `linear` of a DiT's final layer, `proj_out_2` of diffusers'; weights are copied.

        Raises   ValueError for a projection whose width is not a multiple of the patch
        """
        patch = (patch,) * axes if isinstance(patch, int) else tuple(patch)
        if linear.out_features % prod(patch):
            raise ValueError(f"from_linear: patch wants a product that divides {linear.out_features} features, got {patch}")
        made = cls(linear.in_features, linear.out_features // prod(patch), patch, bias=linear.bias is not None, order=order)
        return _load(made, ((made.linear.weight, linear.weight), (made.linear.bias, linear.bias)), linear.weight)


class PatchedUNet(nn.Module):
    """depth_to_space(unet(space_to_depth(x), ...)): a convolutional denoiser on a grid that is `patch` times coarser.

    Shapes   x (B, C, *space), 1-D to 3-D, that the patch divides; the unet takes prod(patch) * C channels at space / patch and gives
             prod(patch) * C' there -> (B, C', *space). Where it gives a tuple, each of its tensors is put back
    Options  patch: an int or one per axis; order: of a patch's elements in the channels, "pqc" (row, column, channel) or "cpq"
             (pixel_unshuffle); heads: how many outputs of the unet lie side by side in its channels, each with its own patches
    State    unet: the denoiser as it was given; other arguments of a call go to it unchanged
    Source   Luhman & Luhman 2022, section 3
    """

    def __init__(self, unet, patch, *, order="pqc", heads=1):
        super().__init__()
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise ValueError(f"PatchedUNet: heads wants an int of at least 1, got {heads!r}")
        self.unet, self.patch, self.order, self.heads = unet, patch, order, heads

    def _image(self, y):
        if y.shape[1] % self.heads:
            raise ValueError(f"PatchedUNet: heads wants a divisor of the unet's {y.shape[1]} channels, got {self.heads}")
        images = [depth_to_space(part, self.patch, order=self.order) for part in y.chunk(self.heads, 1)]
        return images[0] if self.heads == 1 else torch.cat(images, 1)

    def forward(self, x, *arguments, **options):
        y = self.unet(space_to_depth(x, self.patch, order=self.order), *arguments, **options)
        if isinstance(y, tuple | list):
            return tuple(map(self._image, y))
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"PatchedUNet: unet wants to give a tensor or a tuple of tensors, gave a {type(y).__name__}")
        return self._image(y)

    def extra_repr(self):
        return f"patch={self.patch}, order={self.order}, heads={self.heads}"
