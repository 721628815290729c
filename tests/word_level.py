"""A word-level tokenizer whose token ids can be written down by hand."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from open_rm.data.encoding import encode_pairs, render_pair
from open_rm.data.tokenizer import load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "hi", "you", "yes", "no", "user:", "bot:"]
UNK, BOS, EOS, HI, YOU, YES, NO, USER, BOT = range(9)
TEMPLATE = (
    "{% for m in messages %}{{ 'user: ' if m['role'] == 'user' else 'bot: ' }}{{ m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
)


def make(adds_bos: bool, adds_eos: bool = False, **special) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose post-processor adds BOS (and EOS) or not."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if adds_eos else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def load(tmp_path, tokenizer, **kwargs):
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path), **kwargs)


def ids(tokenizer, prompt, chosen, rejected):
    [pair] = encode_pairs(tokenizer, [render_pair(tokenizer, prompt, chosen, rejected)])
    return pair.chosen, pair.rejected, len(pair.prompt)
