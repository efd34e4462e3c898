"""The byte-level tokeniser of the sizes that download nothing: every byte of UTF-8 is a token, plus Qwen's markers."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKERS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens and six markers; round-trips any text; `<|pad|>` pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKERS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", padding_side="right")
