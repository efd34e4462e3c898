"""The byte-level tokeniser of the sizes that download nothing.

Every byte of UTF-8 is a token, so any text round-trips; Qwen's markers and the common words of robot instructions have
tokens of their own, which halves a prompt and with it the cost of a step on a CPU.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKERS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = (  # noqa: SIM905 - a list of strings would be a page long
    "the a and of to in on into it its at from with left right top bottom middle front back up down inside next put "
    "pick place open close turn push pull lift rotate slide stack move press take grasp go drop towards between bowl "
    "plate stove drawer cabinet rack basket table block box tray caddy pan pot mug cup bottle spoon towel sink wine "
    "cream cheese soup sauce butter milk juice pudding ketchup dressing salad tomato alphabet chocolate orange red "
    "blue green pink yellow white black carrot eggplant cube apple can light button switch handle object slider "
).split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, six markers and WORDS; round-trips any text; `<|pad|>` pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKERS)
    tokenizer.add_tokens([prefix + word for word in WORDS for prefix in (" ", "")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", padding_side="right")
