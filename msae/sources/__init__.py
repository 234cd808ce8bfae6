"""Where activations come from: a language model or a synthetic world."""
