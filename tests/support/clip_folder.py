"""A tiny CLIP model with random weights, in the folder that transformers writes.

Not here: the tests of CLIP scores (tests/quality/test_clip_score.py, tests/whole_runs/test_text_runs.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from text_pipelines import TOKENS, tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
WORDS = {"vocab_size": 518, "max_position_embeddings": TOKENS, "bos_token_id": 516, "eos_token_id": 517}


def clip_folder(folder: Path) -> Path:
    """Write a CLIP model for pictures of 32x32, and return its folder."""
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(**SHAPE, **WORDS), CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    model = CLIPModel(config)
    for parameter in model.parameters():  # as they are made they are so small that all pictures look alike
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder / "clip")
    tokenizer(folder / "clip-words").save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "clip")
    return folder / "clip"
