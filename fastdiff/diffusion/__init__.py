"""Processes, schedules and samplers; a denoiser is any callable of (z, t)."""

from .blurring import BlurringDiffusion

__all__ = ["BlurringDiffusion"]
