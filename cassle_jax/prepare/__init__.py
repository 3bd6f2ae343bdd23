"""Prepares a dataset for fast reading: images with a bounded short side, in array_record shards."""

from cassle_jax.prepare.dataset import Preparation, prepare

__all__ = ["Preparation", "prepare"]
