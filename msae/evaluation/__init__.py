"""Figures of a trained SAE: reconstruction, the language model's loss, and the truth where it is known."""
