"""Training steps of published sparse autoencoders, for benchmarks/step.py alone."""
