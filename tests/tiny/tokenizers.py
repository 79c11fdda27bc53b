"""Real tokenizers of a few hundred tokens, made in memory: every text is spelt letter by letter."""

from __future__ import annotations

import json
import string

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen-Image-Edit and HunyuanVideo 1.5 put before a prompt.
QWEN_IMAGE_TEMPLATES = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.",
    "You are a helpful assistant. Describe the video by detailing the following aspects: 1. The main content and theme "
    "of the video. 2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. 3. "
    "Actions, events, behaviors temporal relationships, physical movement changes of the objects. 4. background "
    "environment, light, style and atmosphere. 5. camera angles, movements, and transitions used in the video.",
)
QWEN_VL_MARKS = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_VL_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% set marker = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "[{{ marker }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ marker }}]{% endfor %}"
)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges; the markers come last, as in CLIP's own vocabulary."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer with one token for each character."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in CHARACTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def bert_tokenizer() -> BertTokenizer:
    """BERT's WordPiece tokenizer with one token for each character, at the start of a word and within one."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{letter}" for letter in CHARACTERS)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocab, model_max_length=77)


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's byte-level BPE without merges."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=77)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level BPE: the words of Qwen-Image's template are whole tokens, every other text is spelt out.

    The pipeline drops the template by its length in tokens, which must be that of the published tokenizer.
    """
    vocab = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    blank = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = blank.train_new_from_iterator([QWEN_TEMPLATE], vocab_size=1000, show_progress=False)
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def qwen_vl_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with the markers of images, and the words of more templates as tokens."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    blank = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    texts = [QWEN_TEMPLATE, *QWEN_IMAGE_TEMPLATES]
    tokenizer = blank.train_new_from_iterator(texts, vocab_size=2000, show_progress=False)
    tokenizer.add_tokens(QWEN_VL_MARKS, special_tokens=True)
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", QWEN_VL_CHAT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's BPE with bytes to fall back on; padded on the right as Lumina 2 reads its masks."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *BYTES, *CHARACTERS]
    vocab = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=[], padding_side="right", model_max_length=512)


def llama_tokenizer() -> LlamaTokenizer:
    """Llama's BPE with bytes to fall back on, padded on the right by the token of the unknown."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *BYTES, *CHARACTERS]
    vocab = {token: number for number, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="<unk>", padding_side="right", model_max_length=512)


def _byte_level(specials: list[str], start: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges that pads on the left by the first of ``specials``."""
    vocab = {token: number for number, token in enumerate([*specials, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    if start:
        used = [(token, vocab[token]) for token in start.split()]
        backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=specials[0], extra_special_tokens=specials[1:], padding_side="left"
    )


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """GLM's byte-level BPE, which starts every text with two markers."""
    return _byte_level(["<|endoftext|>", "[gMASK]", "<sop>"], "[gMASK] <sop>")


def mistral_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """Mistral's byte-level BPE, where those ``words`` are whole tokens and every other text is spelt out."""
    markers = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    blank = _byte_level(["<pad>", "<s>", *markers], "")
    tokenizer = blank.train_new_from_iterator([words], vocab_size=1000, show_progress=False)
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def hunyuan_video_tokenizer() -> LlamaTokenizer:
    """Llama's BPE with merges learnt from HunyuanVideo's template.

    The pipeline drops the first 95 tokens as the template; with 300 tokens in all it is slightly more than that, so
    that no letter of the prompt is dropped with it.
    """
    markers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    specials = ["<unk>", "<s>", "</s>", "<pad>", *markers]
    learnt = Tokenizer(BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = Metaspace()
    learnt.train_from_iterator(
        [DEFAULT_PROMPT_TEMPLATE["template"]],
        BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=list(CHARACTERS), show_progress=False),
    )
    model = json.loads(learnt.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<pad>",
        padding_side="right",
        extra_special_tokens=markers,
    )
