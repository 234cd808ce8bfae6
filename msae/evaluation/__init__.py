"""What a trained SAE is worth: reconstruction, language-model loss, and the truth where it is known."""
