"""What `python -m fastdiff train` trains: a model, its loss and its sampler, sized for the images that it is given."""

from functools import partial
from math import log2

import torch
import torch.nn.functional as F

from .diffusion import BlurringDiffusion, Continuous, Discrete, classifier_free, cosine_betas, ddpm, sample, sigmoid_gamma, warm_state
from .models import ADM, RIN, PatchedUNet
from .ops import from_bits, to_bits


def _normal(x, generator):
    return torch.randn(x.shape, generator=generator).to(x.device)


def _uniform(x, generator):
    """(B,), float64 on [0, 1)."""
    return torch.rand(x.shape[0], dtype=torch.float64, generator=generator).to(x.device)


class Preset:
    """A model of images (channels, size, size) of integers 0 to `most`, with or without classes.

    Labels y are (B,) int64, `classes` for no label; None where there are no classes. The generator is a torch.Generator on the CPU:
    it draws all that is random.
    """

    steps, rate = 2000, 1e-3
    unlabelled = 0.1  # share of the samples trained without their label, for guidance

    def __init__(self, channels, size, most, classes):
        self.image, self.most, self.classes = (channels, size, size), most, classes

    def encode(self, x):
        """The integers as the model sees them, in [-1, 1]."""
        return x.float() * (2 / self.most) - 1

    def decode(self, x):
        return ((x + 1) * (self.most / 2)).round().clamp(0, self.most).to(torch.uint8)

    def drop(self, y, generator):
        """The labels, some of them replaced by none."""
        return y if y is None else torch.where(_uniform(y, generator) < self.unlabelled, self.classes, y)

    def guided(self, denoiser, y, weight):
        """denoiser(y) with classifier-free guidance."""
        if y is None or weight == 1:
            return denoiser(y)
        return classifier_free(denoiser(y), denoiser(torch.full_like(y, self.classes)), weight)

    def noise(self, count, device, generator):
        return torch.randn((count, *self.latent), generator=generator).to(device)

    @property
    def latent(self):
        return self.image


class LatentRIN(Preset):
    """RIN with latent self-conditioning: 9 of 10 samples start from the latents of a first pass (Jabri et al. 2023, section 3.2).

    It predicts the data: the norm behind its stem hides how large a patch of few pixels is, which the noise could not be told without.
    """

    steps, sampled, warm = 4000, 100, 0.9
    schedule = staticmethod(sigmoid_gamma)

    def __init__(self, *data):
        super().__init__(*data)
        size = self.image[1]
        self.process = Continuous(self.schedule)
        self.model = RIN((size, size), patch=max(2, size // 16), channels=self.latent[0], dim=64, latents=16, latent_dim=128,
                         layers=(2, 2), heads=4, latent_heads=4, latent_mlp_ratio=2, classes=self.classes)

    def _denoiser(self, model, y):
        label = None if y is None else F.one_hot(y, self.classes + 1)[:, :-1].float()
        return lambda z, gamma, latents: model(z, gamma, label, latents)[:2]

    def loss(self, model, x, y, generator):
        x, t = self.encode(x), _uniform(x, generator)
        noise, keep = _normal(x, generator), _uniform(x, generator) < self.warm
        denoiser = self._denoiser(model, self.drop(y, generator))
        z, gamma = self.process.diffuse(x, noise, t), self.process.told(t)
        pred, _ = denoiser(z, gamma, warm_state(denoiser, z, gamma, keep))
        return F.mse_loss(pred, x)

    def sample(self, model, count, y, weight, device, generator):
        plan = ddpm(self.process.steps(self.sampled), prediction="x0", clip=1.0)
        denoiser = self.guided(partial(self._denoiser, model), y, weight)
        return self.decode(sample(denoiser, self.noise(count, device, generator), plan, self_condition="state", generator=generator))


class BitRIN(LatentRIN):
    """The same on analog bits (Chen, Zhang & Hinton 2023); integers above `most` come back as `most`."""

    @property
    def bits(self):
        return self.most.bit_length()

    @property
    def latent(self):
        return (self.image[0] * self.bits, *self.image[1:])

    def encode(self, x):
        return to_bits(x, self.bits)

    def decode(self, x):
        return from_bits(x, self.bits).clamp(max=self.most)


class Patched(Preset):
    """A U-Net on patches of 2x2 pixels, predicting the data; loss weighted by sqrt(SNR), at most 5 (Luhman & Luhman 2022)."""

    sampled = 100

    def __init__(self, *data):
        super().__init__(*data)
        channels, size, _ = self.image
        levels = max(2, int(log2(size)) - 2)
        self.process = Discrete(cosine_betas(1000))
        self.model = PatchedUNet(size, patch=2, width=64, multipliers=(1, *(2,) * (levels - 1)), blocks=1, attention=(8, 4, 2), head_dim=32,
                                 in_channels=channels, classes=self.classes or None, variance=False)

    def loss(self, model, x, y, generator):
        x, noise = self.encode(x), _normal(x, generator)
        t = (_uniform(x, generator) * len(self.process.betas)).long()
        pred = model(self.process.diffuse(x, noise, t), self.process.told(t), self.drop(y, generator))
        signal, sigma = self.process.marginal(t)
        weight = (signal / sigma).clamp(max=5.0).to(x)
        return (weight * (pred - x).square().flatten(1).mean(1)).mean()

    def sample(self, model, count, y, weight, device, generator):
        plan = ddpm(self.process.respaced(self.sampled).steps(), prediction="x0", clip=1.0)
        denoiser = self.guided(lambda y: lambda z, t: model(z, t, y), y, weight)
        return self.decode(sample(denoiser, self.noise(count, device, generator), plan, generator=generator))


class Blurring(Preset):
    """Blurring diffusion, predicting the noise with a small ADM; the blur's widest is 5/8 of the image, as 20 pixels of 32."""

    sampled = 100

    def __init__(self, *data):
        super().__init__(*data)
        channels, size, _ = self.image
        self.process = BlurringDiffusion(max_width=0.625 * size)
        self.model = ADM(size, width=32, multipliers=(1, *(2,) * (int(log2(size)) - 2)), blocks=1, attention=(8, 4), head_dim=32,
                         in_channels=channels, out_channels=channels, classes=self.classes + 1 if self.classes else None, resample="conv")

    def loss(self, model, x, y, generator):
        x, t, noise = self.encode(x), _uniform(x, generator), _normal(x, generator)
        z, t, _ = self.process.training_pair(x, t, noise)
        return F.mse_loss(model(z, 1000 * t, self.drop(y, generator)), noise)

    def sample(self, model, count, y, weight, device, generator):
        denoiser = self.guided(lambda y: lambda z, t: model(z, 1000 * t, y), y, weight)
        return self.decode(self.process.sample(denoiser, self.noise(count, device, generator), self.sampled, generator=generator))


PRESETS = {"rin": LatentRIN, "bit-rin": BitRIN, "patched-unet": Patched, "blurring": Blurring}
