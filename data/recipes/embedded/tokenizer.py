"""A byte-level BPE of 1,024 tokens in which a digit is the same single token at any position.

Digits are never merged and include the space before them, and a text that starts without a space gets one: "4", " 4"
and the 4 of "four digits: 4" are the same token. Otherwise a small model would have to learn every digit twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 1024
SPECIALS = ("<|pad|>", "<|endoftext|>", "<|image|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Word pattern over the byte-level alphabet, where a space is written Ġ and a line break Ċ.
WORDS = r"Ġ?[0-9]|Ġ?[A-Za-z]+|Ġ?[^ĠĊA-Za-z0-9]+|Ċ+|Ġ+(?=Ġ)|Ġ+"


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int = VOCAB_SIZE) -> None:
    """Train on `texts` and save in Hugging Face's format (tokenizer.json, tokenizer_config.json)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Add the space before splitting; afterwards, every piece would get one.
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIALS if t not in ("<|pad|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    wrapped.save_pretrained(str(folder))
