"""Images with text as calibration data of a vision-language model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from vision_language import FAMILIES, IMAGE

import effllm
from effllm.data.inputs import folder_batches
from effllm.data.pairs import pair_batches
from effllm.errors import EffllmError
from effllm.plans import Calibration, load_plan

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny LLaVA with a processor of its own."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    folder = tmp_path_factory.mktemp("pairs") / "llava"
    FAMILIES["llava"].make().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(257, IMAGE)] + ["<image>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    images = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs") / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (50, 60, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"picture {number}, all noise"} for number in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def written(batch) -> list[int]:
    """The tokens of a batch that stand for no image."""
    return [token for token in batch["input_ids"][0].tolist() if token < IMAGE]


def tokens(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_pair_becomes_what_the_processor_makes_of_it(folder, pairs):
    found = pair_batches(folder, pairs, 3)
    assert len(found) == 3
    for batch in found:
        assert (batch["input_ids"] == IMAGE).sum() == 25 and batch["pixel_values"].shape == (1, 3, 40, 40)
    assert [written(batch) for batch in found] == [[0, *tokens(f"picture {n}, all noise")] for n in (0, 2, 4)]


def test_a_chat_template_has_the_image_shown_and_the_text_said(folder, pairs, tmp_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %};{% endfor %}"
    )
    processor.save_pretrained(tmp_path)
    assert written(pair_batches(tmp_path, pairs, 1)[0]) == tokens("user:;assistant:picture 0, all noise;")


def test_with_pairs_the_vision_tower_has_a_price(folder, pairs, tmp_path):
    plan = {"budget": "5bpw", "steps": [{"sites": ["*"], "choose": ["quantize:bits=4", "quantize:bits=8"]}],
            "calibration": {"samples": 6, "sequence_length": 32}}  # fmt: skip
    effllm.compress_folder(folder, tmp_path / "out", load_plan(plan).override(sources=[pairs]), check=False)
    journal = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sites"]
    names = [name for entry in journal for name in entry["sites"]]
    assert any("vision_tower" in name and "self_attn" in name for name in names), names


def test_text_and_pairs_share_the_samples_by_their_weights(folder, pairs):
    model = effllm.load(folder)
    settings = Calibration(sources=[f"{pairs}@1", "default@3"], samples=8, sequence_length=32)
    batches = folder_batches(settings, model, folder)
    images = [batch for batch in batches if "pixel_values" in batch]
    assert len(images) == 2 and all(batch["pixel_values"].dtype == model.dtype for batch in images)
    assert sum(len(batch["input_ids"]) for batch in batches if "pixel_values" not in batch) == 6


@pytest.mark.parametrize("row", ['{"file_name": "0.png"}', '{"file_name": "../0.png", "text": "x"}', "[1]", "{"])
def test_a_bad_row_is_named(folder, row, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(EffllmError, match=r"metadata\.jsonl"):
        pair_batches(folder, str(tmp_path), 1)


def test_a_missing_image_is_named(folder, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "none.png", "text": "x"}')
    with pytest.raises(EffllmError, match=r"none\.png cannot be read"):
        pair_batches(folder, str(tmp_path), 1)
