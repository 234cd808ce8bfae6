"""Matryoshka sparse autoencoders: harvest activations, train nested dictionaries, measure the hierarchy."""

__version__ = "0.1.0"
