"""Local tokenizers, encoders and processors in place of those that the suite downloads.

They have the same classes and random weights. They are installed in the process that builds a suite's components, never
in one that opens the saved pipeline.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["NotHereError", "install"]

TOKENIZERS = Path(__file__).parents[2] / "tests" / "tiny" / "tokenizers.py"

QWEN_MARKS = [f"<|{mark}|>" for mark in ("im_start", "im_end", "vision_start", "vision_end")]
QWEN_MARKS += ["<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<think>", "</think>", "<|endoftext|>"]
GEMMA_MARKS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
# Each part of a message is written by ``{parts}``; an image is a marker.
_PARTS = (
    "{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}{{% for part in message.content %}}"
    "{marks}{{{{ part.text }}}}{end}{{% endfor %}}{{% endif %}}"
)
_QWEN_IMAGES = (
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}"
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    + _PARTS.format(marks=_QWEN_IMAGES, end="{% endif %}")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    + _PARTS.format(marks="{% if part.text is defined %}", end="{% endif %}")
    + "{% endfor %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    + _PARTS.format(marks="{% if part.type == 'image' %}<start_of_image>{% else %}", end="{% endif %}")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class NotHereError(OSError):
    """A file of the Hub that has no local stand-in."""


def install(scratch: Path) -> None:
    """Make ``from_pretrained`` of transformers return stand-ins for everything that is not a folder on this disk.

    Args:
        scratch: a folder for the vocabulary that one tokenizer reads from a file.
    """
    tokenizers = _Tokenizers(scratch)
    from transformers.configuration_utils import PretrainedConfig
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    def processor(name: str, cls: type) -> Any:
        return _processor(name, cls, tokenizers)

    for owner in (PreTrainedTokenizerBase, transformers.AutoTokenizer):
        _replace(owner, tokenizers.make)
    for owner in (PretrainedConfig, transformers.AutoConfig):
        _replace(owner, lambda name, cls: _config(name))
    _replace(transformers.PreTrainedModel, _model)
    for owner in (
        transformers.ProcessorMixin,
        transformers.AutoProcessor,
        ImageProcessingMixin,
        FeatureExtractionMixin,
    ):
        _replace(owner, processor)


def _replace(owner: type, make: Callable[[str, type], Any]) -> None:
    original = owner.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, pretrained_model_name_or_path: Any = "", *args: Any, **given: Any) -> Any:
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            return original(cls, name, *args, **given)
        return make(name, cls)

    owner.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]


class _Tokenizers:
    """The tokenizers of the project's own tests, and further ones of the same sort.

    Their file is loaded by its path: the suite is a package named ``tests`` too.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        spec = importlib.util.spec_from_file_location("tiny_tokenizers", TOKENIZERS)
        if spec is None or spec.loader is None:
            raise NotHereError(str(TOKENIZERS))
        self.tiny: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.tiny
        spec.loader.exec_module(self.tiny)

    def make(self, name: str, cls: type) -> Any:
        """Return a tokenizer by the name of its repository and the class that was called."""
        text = f"{name} {cls.__name__}".lower()
        # The first part of a name that matches decides: umt5 and T5 are of one class, XLM-Roberta is no BERT.
        makers: tuple[tuple[tuple[str, ...], Callable[[], Any]], ...] = (
            (("mclip", "xlmroberta"), self._xlm_roberta),
            (("roberta",), self._roberta),
            (("clip",), self.tiny.clip_tokenizer),
            # The repository's name has this spelling.
            (("hunyaunvideo",), self.tiny.hunyuan_video_tokenizer),
            (("t5",), self.tiny.t5_tokenizer),
            (("qwen", "cosmos3"), self.qwen),
            (("gemma3", "gemma-3"), self.gemma),
            (("gemma",), self.tiny.gemma_tokenizer),
            (("bert",), self.tiny.bert_tokenizer),
            (("llama",), self._llama),
            (("chatglm",), lambda: self._chatglm(cls)),
            (("glm",), self.tiny.glm_tokenizer),
            (("smollm", "mistral", "gpt2"), lambda: self.tiny.mistral_tokenizer("a photo of a cat")),
        )
        for parts, maker in makers:
            if any(part in text for part in parts):
                return maker()
        raise NotHereError(f"{cls.__name__} of {name} has no local stand-in")

    def qwen(self) -> Any:
        """Qwen's tokenizer with the markers of images."""
        tokenizer = self.tiny.qwen_tokenizer()
        tokenizer.add_tokens(QWEN_MARKS, special_tokens=True)
        tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", QWEN_CHAT
        return tokenizer

    def gemma(self) -> Any:
        """Gemma 3's tokenizer with the markers of turns and images."""
        tokenizer = self.tiny.gemma_tokenizer()
        tokenizer.add_tokens(GEMMA_MARKS, special_tokens=True)
        tokenizer.chat_template = GEMMA_CHAT
        return tokenizer

    def _llama(self) -> Any:
        tokenizer = self.tiny.llama_tokenizer()
        tokenizer.chat_template = LLAMA_CHAT
        return tokenizer

    def _xlm_roberta(self) -> Any:
        specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
        letters = [("▁", -2.0), *((letter, -3.0) for letter in self.tiny.CHARACTERS)]
        return transformers.XLMRobertaTokenizer(vocab=[*specials, *letters, ("<mask>", 0.0)], model_max_length=77)

    def _roberta(self) -> Any:
        from tokenizers.pre_tokenizers import ByteLevel

        tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
        vocab = {token: number for number, token in enumerate(tokens)}
        return transformers.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=77)

    def _chatglm(self, cls: Any) -> Any:
        import sentencepiece

        base, letters = self.scratch / "chatglm", self.tiny.CHARACTERS
        lines = [
            " ".join(letters[(line * 7 + word) % len(letters)] * (1 + word % 3) for word in range(30))
            for line in range(400)
        ]
        base.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(base.with_suffix(".txt")),
            model_prefix=str(base),
            vocab_size=300,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return cls(vocab_file=str(base.with_suffix(".model")))


def _config(name: str) -> Any:
    low = name.lower()
    t5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
    if "umt5" in low:
        return transformers.UMT5Config(**t5, feed_forward_proj="gated-gelu")
    if "t5" in low:
        return transformers.T5Config(
            **t5, feed_forward_proj="relu", relative_attention_num_buckets=8, decoder_start_token_id=0
        )
    if "bert" in low:
        return transformers.BertConfig(vocab_size=1124, max_position_embeddings=512, **sizes)
    if "llama" in low:
        return transformers.LlamaConfig(
            vocab_size=1000, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    raise NotHereError(f"the configuration of {name} has no local stand-in")


# A decoder of two layers with two heads, which share keys and values.
_DECODER = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
_MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default"}


def _model(name: str, cls: Any) -> Any:
    kind = cls.__name__
    if kind in ("T5EncoderModel", "UMT5EncoderModel", "BertModel", "LlamaForCausalLM"):
        return cls(_config(f"{name} {kind}")).eval()
    if kind.startswith("Gemma3"):
        return cls(_gemma3()).eval()
    if kind == "SiglipVisionModel":
        vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        return cls(transformers.SiglipVisionConfig(**vision, image_size=30, patch_size=2)).eval()
    if kind == "ChatGLMModel":
        return cls(_chatglm()).eval()
    if kind in ("Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"):
        return cls(_qwen_vl(third="Qwen3" in kind)).eval()
    raise NotHereError(f"{kind} of {name} has no local stand-in")


def _gemma3() -> Any:
    text = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 16, "head_dim": 8, "sliding_window": 32}
    vision = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=text | _DECODER | {"query_pre_attn_scalar": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


def _chatglm() -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    return ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=1000,
        hidden_size=8,
        ffn_hidden_size=16,
        kv_channels=4,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        rmsnorm=True,
        original_rope=True,
    )


def _qwen_vl(*, third: bool) -> Any:
    """Return a tiny configuration of the second or third Qwen-VL."""
    text: dict[str, Any] = {"vocab_size": 2000, "hidden_size": 16, "intermediate_size": 16} | _DECODER
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2}
    text["max_position_embeddings"] = 2048
    if not third:
        text["rope_scaling"] = _MROPE | {"type": "mrope"}
        return transformers.Qwen2VLConfig(text_config=text, vision_config=vision | {"embed_dim": 16, "patch_size": 14})
    rope = _MROPE | {"mrope_interleaved": True}
    text |= {"head_dim": 8, "rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 10000.0}}
    vision |= {"intermediate_size": 16, "out_hidden_size": 16, "patch_size": 16, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision)


def _processor(name: str, cls: type, tokenizers: _Tokenizers) -> Any:
    text, kind = f"{name} {cls.__name__}".lower(), cls.__name__
    if "qwen" in text:
        return _qwen_processor(kind, tokenizers.qwen())
    if kind == "ClapFeatureExtractor":
        return transformers.ClapFeatureExtractor(hop_length=7900)
    if "mistral" in text:
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        images = transformers.PixtralImageProcessor(size={"longest_edge": 30}, patch_size=6)
        tokenizer = tokenizers.tiny.mistral_tokenizer(SYSTEM_MESSAGE)
        return transformers.PixtralProcessor(image_processor=images, tokenizer=tokenizer, patch_size=6)
    if kind == "CLIPImageProcessor":
        return transformers.CLIPImageProcessor(crop_size=32, size=32)
    if kind == "SiglipImageProcessor":
        return transformers.SiglipImageProcessor(size={"height": 30, "width": 30})
    if kind == "DPTImageProcessor":
        return transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    if "gemma" in text:
        images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        return transformers.Gemma3Processor(image_processor=images, tokenizer=tokenizers.gemma(), image_seq_length=4)
    raise NotHereError(f"{kind} of {name} has no local stand-in")


def _qwen_processor(kind: str, tokenizer: Any) -> Any:
    given = {"tokenizer": tokenizer, "chat_template": QWEN_CHAT}
    if "Qwen3" in kind:
        images = transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2)
        video = transformers.Qwen3VLVideoProcessor()
        return transformers.Qwen3VLProcessor(image_processor=images, video_processor=video, **given)
    processor = transformers.Qwen2_5_VLProcessor if "Qwen2_5" in kind else transformers.Qwen2VLProcessor
    images, video = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
    return processor(image_processor=images, video_processor=video, **given)
