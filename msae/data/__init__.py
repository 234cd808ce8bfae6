"""Activations on disk: harvest, shards, row order, batches."""
