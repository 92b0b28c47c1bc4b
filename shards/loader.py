"""Former name of :mod:`shards.dataset`, for scripts that import it."""

from shards.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]
