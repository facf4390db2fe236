"""The tokenizer of the embedded task: one id for each word, 64 in all, made without a network.

A word is what stands between blanks. As with the tokenizers of large models, the token that begins a sequence is added
by the tokenizer (`add_special_tokens=False` for responses) and batches are padded on the left.
"""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prune_opd_hf.tasks.chain import ANSWER, DIGITS, END, EQUALS, FILLERS, HESITATION, OPERATIONS, SEPARATOR

PAD, BEGIN, UNKNOWN = "<pad>", "<bos>", "<unk>"
VOCABULARY = (PAD, BEGIN, END, UNKNOWN, SEPARATOR, EQUALS, HESITATION, ANSWER, *DIGITS, *OPERATIONS, *FILLERS)
"""Every word, in the order of its id."""

CONTEXT_TOKENS = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer over `VOCABULARY` with left padding and distinct tokens for padding, beginning and end.

    Example: the beginning is added, and decoding gives the prompt back.
        >>> tokenizer = build_tokenizer()
        >>> tokenizer(", +3 , x7 = 4").input_ids
        [1, 4, 20, 4, 28, 5, 12]
        >>> tokenizer.decode([1, 4, 20, 4, 28, 5, 12], skip_special_tokens=True)
        ', +3 , x7 = 4'
        >>> len(tokenizer)
        64
    """
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
