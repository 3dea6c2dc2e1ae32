"""diffusers' schedulers as plans."""

import torch

from ..core.check import fail
from .plans import Plan

_PREDICTIONS = dict(epsilon="eps", sample="x0", v_prediction="v")
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


def from_diffusers(scheduler, *, eta=0.0, rederive=False):
    """The plan of a DDPMScheduler or DDIMScheduler after its set_timesteps: the same steps, coefficients, clipping and noise.

    eta, rederive  DDIM's step arguments eta and use_clipped_model_output
    Coefficients are formed, and steps rounded, as the scheduler does it: in float32 its betas, 1 - a / b, are up to 1e-3 from exact ones,
    and a sample made with exact ones is another sample.
    """
    name = type(scheduler).__name__
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        fail("from_diffusers", f"scheduler wants a DDPMScheduler or a DDIMScheduler, got {name}")
    config, ddpm = scheduler.config, name == "DDPMScheduler"
    if ddpm and config.variance_type not in _VARIANCES:
        fail("from_diffusers", f"variance_type wants one of {', '.join(map(repr, _VARIANCES))}, got {config.variance_type!r}")
    if not ddpm and scheduler.num_inference_steps is None:
        fail("from_diffusers", "scheduler wants its set_timesteps called")
    if not 0 <= eta <= 1:
        fail("from_diffusers", f"eta wants a value in [0, 1], got {eta}")
    time, gammas = scheduler.timesteps.cpu(), scheduler.alphas_cumprod.cpu()
    if ddpm:
        before, final = torch.cat([time[1:], time.new_tensor([-1])]), gammas.new_ones(())
    else:
        before = time - config.num_train_timesteps // scheduler.num_inference_steps
        final = scheduler.final_alpha_cumprod.cpu()
    gamma, target = gammas[time], torch.where(before >= 0, gammas[before.clamp(min=0)], final)
    rest, rest_target, alpha = 1 - gamma, 1 - target, gamma / target
    beta = 1 - alpha
    small = rest_target / rest * beta
    signal, sigma, ratio = gamma.sqrt(), rest.sqrt(), None
    if ddpm:
        small = small.clamp(min=1e-20)
        to_x0, to_eps = target.sqrt() * beta / rest, alpha.sqrt() * rest_target / rest
        std = beta.sqrt() if config.variance_type == "fixed_large" else small.sqrt()
        std = torch.where(time > 0, std, 0.0)
        ratio = beta.log() - small.log() if config.variance_type == "learned_range" else None
    else:
        std = eta * small.sqrt()
        to_x0, to_eps = target.sqrt(), (rest_target - std.square()).sqrt()
    columns = (c if c is None else c.double() for c in (signal, sigma, to_x0, to_eps, std if ddpm or eta else None, ratio))
    threshold = (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None
    return Plan(time, *columns, None, _PREDICTIONS[config.prediction_type], config.clip_sample_range if config.clip_sample and not threshold
                else None, threshold, rederive, ddpm, "mean" if ddpm else "pred")
