"""The worked examples under policies/examples/: their converters read what is published, and their policies are valid.

Not here: a run of them, which takes trained weights and hours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import POLICIES
from torch import nn

from pqcad_qat.errors import ModelError
from pqcad_qat.models.own_model import built, own_model_of
from pqcad_qat.policy.loading import load_policy

ANIME64 = POLICIES / "examples" / "anime64"


@pytest.fixture(scope="module")
def example() -> Any:
    """The converter of anime64, which finds the module beside it."""
    sys.path.insert(0, str(ANIME64))
    try:
        import convert

        yield convert
    finally:
        sys.path.remove(str(ANIME64))


def published(model: nn.Module, folder: Path, kinds: dict[str, type[nn.Module]], readers: Any) -> None:
    """Write a module's weights as TensorFlow.js does: 8-bit integers in shards, layers in an order of their own."""
    entries, data = [], b""
    for kind, cls in kinds.items():
        modules = [module for module in model.modules() if isinstance(module, cls)]
        for number, module in reversed(list(enumerate(modules, start=57))):
            for name, reader in zip(("weight", "bias"), readers[kind], strict=True):
                values = getattr(module, name).detach().numpy()
                values = values.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[values.ndim])
                low, scale = float(values.min()), float(values.max() - values.min()) / 255 or 1.0
                data += np.rint((values - low) / scale).astype(np.uint8).tobytes()
                operation = reader if isinstance(reader, str) else reader[number % 2]
                entries.append(
                    {
                        "name": f"call/unet/{kind}_{number}/{operation}/ReadVariableOp",
                        "shape": list(values.shape),
                        "dtype": "float32",
                        "quantization": {"dtype": "uint8", "scale": scale, "min": low},
                    }
                )
            entries.append({"name": f"call/unet/{kind}_{number}/stack", "shape": [2], "dtype": "int32"})
            data += np.zeros(2, np.int32).tobytes()
    shards = {f"shard{place}.bin": data[place * 4096 : (place + 1) * 4096] for place in range(-(-len(data) // 4096))}
    for name, part in shards.items():
        (folder / name).write_bytes(part)
    manifest = {"weightsManifest": [{"paths": list(shards), "weights": entries}]}
    (folder / "model.json").write_text(json.dumps(manifest))


def test_the_converter_reads_every_tensor_into_its_place(example: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = example.UNet(widths=(8, 16, 24))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    published(model, tmp_path, example.KINDS, example.READERS)
    state = example.state_dict(example.read_tensors(tmp_path), model)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        step = float(value.max() - value.min()) / 255
        assert float((state[name] - value).abs().max()) <= 0.51 * step, name


def test_the_module_predicts_noise_of_its_states_shape(example: Any) -> None:
    model = example.UNet(widths=(8, 16, 24)).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 16, 16), torch.tensor([0, 299])).shape == (2, 3, 16, 16)


def test_without_its_weights_the_example_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = own_model_of(f"{ANIME64 / 'anime64.py'}:own_model")
    monkeypatch.setattr(sys.modules[own.build.__module__], "WEIGHTS", tmp_path / "absent.safetensors")
    with pytest.raises(ModelError, match="allowed the weights that convert"):
        built(own)


def test_its_policy_is_the_shipped_one_with_a_smaller_calibration_set() -> None:
    mine, shipped = load_policy(ANIME64 / "anime64.yaml"), load_policy(POLICIES / "w4a8.yaml")
    assert mine.quantization == shipped.quantization
    assert mine.sampler == shipped.sampler
    assert mine.progressive == shipped.progressive
    assert mine.distillation == shipped.distillation
