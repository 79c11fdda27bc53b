"""CLIP scores by torchmetrics, with a tiny CLIP model."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.evaluation.clip import make_clip_scorer
from fmm_distill.evaluation.draws import prompts_of
from fmm_distill.teachers.conditions import Embeddings
from tests.tiny.tokenizers import clip_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, projection_dim=8, **ends, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=8, **sizes)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def told(teacher):
    rows = Conditioning({"encoder_hidden_states": torch.zeros(3, 2)})
    teacher.conditions = Embeddings(("a cat", "two dogs on a bench", "blue"), rows, None)
    return teacher


def test_scores_are_cosines_of_each_image_and_its_own_prompt(model, told):
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = make_clip_scorer(model, told, 3, CPU)(images, range(2, 7))
    network, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
    prompts = prompts_of(told.conditions, range(2, 7), 3)
    assert len(set(prompts)) > 1
    expected = []
    for image, prompt in zip((images * 255).round().to(torch.uint8), prompts, strict=True):
        given = processor(text=[prompt], images=[image], return_tensors="pt", padding=True)
        with torch.no_grad():
            made = network(**given)
        cosine = torch.cosine_similarity(made.image_embeds, made.text_embeds).item()
        expected.append(max(100 * cosine, 0))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert found.std() > 0


def test_what_has_no_prompts_or_is_no_model_is_refused(model, teacher, told, tmp_path):
    with pytest.raises(UserError, match=r"can't be opened .*expected the Hub id or folder of a CLIP model with"):
        make_clip_scorer(str(tmp_path), told, 3, CPU)
    teacher.conditions = None
    with pytest.raises(UserError, match=r"expected a teacher with prompts, got .*; try null"):
        make_clip_scorer(model, teacher, 3, CPU)
