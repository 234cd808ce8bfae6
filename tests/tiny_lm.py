"""A tiny GPT-2 and a byte-level BPE tokenizer, built in place and saved as a directory; a hub that does not answer."""

from pathlib import Path
from typing import Any

import pytest
import torch

EOT = "<|endoftext|>"
TEXT = "the cat sat on a mat while two dogs ran over old hills and rain fell all day long into quiet rivers"
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0, low: int = 3, high: int = 40) -> list[str]:
    """Random sentences of `low` to `high` words; each begins with its number, which tells documents apart."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator)
    picks = [torch.randint(len(WORDS), (int(n),), generator=generator) for n in lengths]
    return [f"{i} " + " ".join(WORDS[j] for j in pick) for i, pick in enumerate(picks)]


def tiny_tokenizer(special: bool = True, size: int = 300) -> Any:
    """A byte-level BPE tokenizer of about `size` tokens, BOS = EOS = `<|endoftext|>`, or without either."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    names = {"bos_token": EOT, "eos_token": EOT} if special else {}
    own = [EOT] if special else []
    trained.train_from_iterator(sentences(50), vocab_size=size, special_tokens=own, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names)


def tiny_model(directory: Path, tokenizer: Any = None, seed: int = 0, scale: float = 1.0, **config: Any) -> Path:
    """Save a random GPT-2 (2 layers, width 32, 4 heads, context 64), embeddings times `scale`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320} | config
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(scale)
        for block in model.transformer.h:  # GPT-2 starts so small that its blocks hardly matter
            block.attn.c_attn.weight.mul_(10)
            block.mlp.c_fc.weight.mul_(10)
    model.save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory


def close_hub(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the hub refuse connections and use this cache; the offline mode that follows ends with the patch."""
    import datasets
    import huggingface_hub

    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
