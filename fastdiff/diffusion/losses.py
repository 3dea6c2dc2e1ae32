"""Losses of a discrete process: the hybrid loss, the variational bound in bits per dimension, and steps drawn by their loss."""

import math

import torch

from ..core.check import fail, option
from ..ops import denoise_step
from . import sampling
from .plans import ddpm
from .processes import wide


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, element by element."""
    gap = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(gap) - gap + (mean1 - mean2).square() * torch.exp(-log_variance2))


def grid_log_likelihood(x, mean, log_std):
    """ln of the mass that N(mean, exp(2 log_std)) puts on x's bin of width 2/255, the first and last bins open: nats, element by element.

    The distribution function is Page's tanh approximation; below 1e-12 a mass counts as 1e-12.
    Source   Ho et al. 2020, section 3.3
    """

    def below(y):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    scale = torch.exp(-log_std)
    upper, lower = below((x - mean + 1 / 255) * scale), below((x - mean - 1 / 255) * scale)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def reverse(process, z, t, pred, v=None, *, prediction="eps", variance="learned", clip=None):
    """(mean, log_variance) of p(z_{t-1} | z_t) by a network's prediction, the latter as large as z if v is given, else (B, 1, ...)."""
    if (v is None) is (variance == "learned"):
        fail("reverse", f"v wants to be given with the variance 'learned' and with no other, got {variance!r}")
    small, large = _log_variances(process, z, t, variance)
    log_variance = large if variance == "large" else small if v is None else small + (large - small) * (v + 1) / 2
    return _posterior_mean(process, z, t, pred, prediction, clip), log_variance


def _posterior_mean(process, z, t, pred, prediction, clip=None):
    plan = ddpm(process.at(t))
    weights = (c.to(z.device, wide(z)) for c in (plan.signal, plan.sigma, plan.to_x0, plan.to_eps))
    return denoise_step(z, pred, *weights, prediction=prediction, clip=clip)


def _log_variances(process, z, t, variance):
    """Of the posterior, and of beta, (B, 1, ...). At t = 0, where the posterior's is 0, both take its value at t = 1; a learned range
    takes its own beta."""
    option("reverse", "variance", variance, ("small", "large", "learned"))
    betas, gamma, later = process.betas.to(t.device), process.gamma.to(t.device), t.clamp(min=1)
    small = (betas[later] * (1 - gamma[later - 1]) / (1 - gamma[later])).log()
    large = betas[t].log() if variance == "learned" else torch.where(t == 0, small, betas[t].log())
    return (s.to(z.device, wide(z)).view(-1, *(1,) * (z.dim() - 1)) for s in (small, large))


def variational_bound(process, x, z, t, pred, v=None, *, prediction="eps", variance="learned", clip=None):
    """Term t of the bound per sample, bits per dimension: KL(q(z_{t-1} | z_t, x) || p(z_{t-1} | z_t)), at t = 0 -log p(x | z_0)."""
    mean, log_variance = reverse(process, z, t, pred, v, prediction=prediction, variance=variance, clip=clip)
    true, _ = _log_variances(process, z, t, "small")
    kl = gaussian_kl(_posterior_mean(process, z, t, x, "x0"), true, mean, log_variance)
    nats = torch.where((t == 0).view(true.shape), -grid_log_likelihood(x, mean, 0.5 * log_variance), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def prior_bits(process, x):
    """KL(q(z_T | x) || N(0, I)) per sample, bits per dimension."""
    gamma = process.gamma[-1].to(x)
    nats = gaussian_kl(gamma.sqrt() * x, torch.log1p(-gamma), torch.zeros_like(x), torch.zeros_like(gamma))
    return nats.flatten(1).mean(1) / math.log(2)


def hybrid_loss(process, x, z, t, noise, output, *, prediction="eps", variance="learned", weight=None):
    """(loss, mse, bound) per sample: mse + weight bound, the bound teaching the variance alone.

    output   the network's, prediction and v in halves of the channels; with another variance than "learned" the prediction alone
    weight   None: T / 1000, which is the paper's 0.001 of all T terms
    Source   Nichol & Dhariwal 2021, equation 16
    """
    pred, v = output.chunk(2, 1) if variance == "learned" else (output, None)
    mse = (pred - process.target(x, noise, t, prediction)).square().flatten(1).mean(1)
    bound = variational_bound(process, x, z, t, pred.detach(), v, prediction=prediction, variance=variance)
    return mse + (len(process.betas) / 1000 if weight is None else weight) * bound, mse, bound


@torch.no_grad()
def bits_per_dim(process, denoiser, x, *, prediction="eps", variance="learned", clip=1.0, generator=None):
    """(total, bounds (B, T), mse (B, T)) of images x in [-1, 1], bits per dimension; columns from the last step to the first.

    total = prior + all bounds; mse of the prediction's x0. denoiser is called as in `sample`, once a step.
    """
    bounds, errors = [], []
    for step in reversed(range(len(process.betas))):
        t = torch.full(x.shape[:1], step, device=x.device)
        z = process.diffuse(x, sampling.normal(x, generator), t)
        output = denoiser(z, process.told(t))
        pred, v = output.chunk(2, 1) if variance == "learned" else (output, None)
        bounds.append(variational_bound(process, x, z, t, pred, v, prediction=prediction, variance=variance, clip=clip))
        x0, _ = process.x0_and_eps(z, pred, t, prediction=prediction, clip=clip)
        errors.append((x0 - x).square().flatten(1).mean(1))
    bounds, errors = torch.stack(bounds, 1), torch.stack(errors, 1)
    return bounds.sum(1) + prior_bits(process, x), bounds, errors


class LossAwareSteps:
    """Draws training steps t with probability proportional to sqrt(mean of their last squared losses), with a uniform share mixed in.

    Until every step has `kept` losses, all are equally likely. Nothing here waits for the device. With several processes, gather t and
    losses before `update`.

    Source   Nichol & Dhariwal 2021, equation 18
    """

    def __init__(self, steps, *, kept=10, uniform=0.001, device=None):
        # one column more than kept, for losses that later ones of the same update push out
        self.history = torch.zeros(steps, kept + 1, dtype=torch.float64, device=device)
        self.count = torch.zeros(steps, dtype=torch.int64, device=device)
        self.uniform = uniform

    def probabilities(self):
        weights = self.history[:, :-1].square().mean(1).sqrt()
        weights = weights / weights.sum() * (1 - self.uniform) + self.uniform / len(weights)
        warm = (self.count >= self.history.shape[1] - 1).all()
        return torch.where(warm, weights, torch.full_like(weights, 1 / len(weights)))

    def sample(self, batch, generator=None):
        """(t, weight), (batch,) each: loss times weight has the mean of uniform steps."""
        p = self.probabilities()
        t = torch.multinomial(p, batch, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    def update(self, t, loss):
        """Takes the unweighted losses of steps t, in order; of a step's losses the last `kept` count."""
        kept = self.history.shape[1] - 1
        same = t.unsqueeze(1) == t
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        column = torch.where(later < kept, (self.count[t] + earlier) % kept, kept)
        self.history[t, column] = loss.detach().to(self.history)
        self.count.index_add_(0, t, torch.ones_like(t))
