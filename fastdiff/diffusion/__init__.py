"""Processes, schedules and samplers; a denoiser is any callable of (z, t)."""

from .blurring import BlurringDiffusion, InverseHeat
from .foreign import from_diffusers
from .guidance import classifier, classifier_free, dynamic_threshold
from .losses import LossAwareSteps, bits_per_dim, hybrid_loss, prior_bits, variational_bound
from .plans import Plan, ancestral, ddim, ddpm, euler_maruyama, reverse_diffusion
from .processes import VE, VP, Continuous, Discrete, Steps, SubVP
from .sampling import Langevin, estimate, sample, warm_state
from .schedules import cosine_betas, cosine_gamma, linear_betas, sigmoid_gamma, simple_cosine_gamma, simple_linear_gamma, spaced

__all__ = ["VE", "VP", "BlurringDiffusion", "Continuous", "Discrete", "InverseHeat", "Langevin", "LossAwareSteps", "Plan", "Steps",
           "SubVP", "ancestral", "bits_per_dim", "classifier", "classifier_free", "cosine_betas", "cosine_gamma", "ddim", "ddpm",
           "dynamic_threshold", "estimate", "euler_maruyama", "from_diffusers", "hybrid_loss", "linear_betas", "prior_bits",
           "reverse_diffusion", "sample", "sigmoid_gamma", "simple_cosine_gamma", "simple_linear_gamma", "spaced", "variational_bound",
           "warm_state"]
