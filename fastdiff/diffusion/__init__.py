"""Processes, schedules and samplers; a denoiser is any callable of (z, t)."""

from .blurring import BlurringDiffusion, InverseHeat

__all__ = ["BlurringDiffusion", "InverseHeat"]
