"""A student whose frozen weights bitsandbytes keeps in 4 bits (QLoRA), on its CPU kernels."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddk_train.student.memory import NF4_BYTES, Shape, needed
from ddk_train.train import train

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
QLORA = {"r": 4, "quantize": "nf4"}


def test_training_in_4_bits_resumes_and_saves_adapters_for_the_whole_base(
    make_config: Any, teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        student=str(teacher_folder),
        max_steps=3,
        save_steps=1,
        save_total_limit=3,
        lora=QLORA,
        learning_rate=1e-2,
    )
    with caplog.at_level(logging.INFO, "ddk_train"):
        run = train(config)
    assert "documents packed in rows" in caplog.text
    assert "trains 4,096 of 92,352 (4.44%) weights" in caplog.text
    adapters = load_file(run / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert all(adapters[name].any() for name in adapters if "lora_B" in name), "each has moved from 0"
    assert "in nf4, distilled from" in (run / "README.md").read_text()
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(config, resume=True)
    resumed = load_file(run / "adapter_model.safetensors")
    for name, weight in adapters.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run)
    assert loaded.get_base_model().name_or_path == str(teacher_folder.resolve())


def test_four_bits_are_counted(make_config: Any) -> None:
    shape = Shape(weights=1000, trained=100, head=0, layers=1, hidden=8, intermediate=8, quantized=800)
    config = make_config(lora=QLORA, bf16=True)
    assert needed(shape, config, 24, 1)["weights"] == 100 * 2 + 100 * 4 + int(800 * NF4_BYTES) + 2 * 200
