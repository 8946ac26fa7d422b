"""Bytes: stores, shards, the stream, and latent caches."""
