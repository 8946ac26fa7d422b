"""Calotype: train latent diffusion models, from a laptop to a cluster."""

__version__ = "0.1.0"
