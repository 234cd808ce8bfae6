"""The hierarchy within one SAE: edges between its latents, attempts to refute them, and controls."""
