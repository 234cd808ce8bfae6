"""Activations on disk: sources, harvest, shards, batches."""
