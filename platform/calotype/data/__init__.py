"""Bytes: stores, shards, the stream, and latent caches.

The reader is a library of its own: it needs neither Ray nor DeepSpeed nor MLflow.
"""

from calotype.data.chunks import Reading
from calotype.data.dataset import Dataset, open_cache, open_dataset
from calotype.data.shards import Sample
from calotype.data.stream import Batch, Stream

__all__ = ["Batch", "Dataset", "Reading", "Sample", "Stream", "open_cache", "open_dataset"]
