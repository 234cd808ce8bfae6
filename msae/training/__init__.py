"""Lightning around the SAE: the training module, its callbacks and checkpoints."""
