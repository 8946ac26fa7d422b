"""Networks and what is done with them: autoencoder, denoiser, conditions, diffusion, sampling, figures."""
