"""The hierarchy within one SAE: edges between its latents, attempts to refute them, and a page to explore them."""
