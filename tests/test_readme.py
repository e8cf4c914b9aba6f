"""The README says what is: its policy reference equals the schema, and its test command exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic_core import PydanticUndefined

from pqcad_qat.policy import schema
from pqcad_qat.policy.study_cells import load_study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = {
    "model": schema.ModelPolicy,
    "conditions": schema.ConditionsPolicy,
    "sampler": schema.SamplerPolicy,
    "calibration": schema.CalibrationPolicy,
    "quantization": schema.QuantizationPolicy,
    "quantization.layers[]": schema.LayerRule,
    "quantization.layers[].weights": schema.WeightQuantizer,
    "quantization.layers[].inputs": schema.InputQuantizer,
    "progressive": schema.ProgressivePolicy,
    "distillation": schema.DistillationPolicy,
    "training": schema.TrainingPolicy,
    "evaluation": schema.EvaluationPolicy,
    "export": schema.ExportPolicy,
    "pipeline": schema.PipelinePolicy,
}


def policy_reference() -> list[str]:
    """The rows of the README's table, from the schema."""
    rows = []
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            default = "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
            rows.append(f"| `{name}.{key}` | {default} | {field.description} |")
    return rows


def test_the_policy_reference_is_the_schema() -> None:
    written = [line for line in README.splitlines() if re.match(r"\| `(model|sampler|[a-z]+)\.[a-z_\[\].]+` \|", line)]
    assert written == policy_reference()


def test_every_shipped_policy_is_named() -> None:
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "policies").rglob("*.yaml")}
    assert shipped == set(re.findall(r"`(policies/[a-z0-9/-]+\.yaml)`", README))


def test_the_study_that_is_shown_is_one(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "bits.yaml").write_text(README.split("```yaml")[1].split("```")[0])
    for name in ("w4a8.yaml", "w2a8.yaml"):
        (tmp_path / name).write_text((ROOT / "policies" / name).read_text())
    assert len(load_study(tmp_path / "studies" / "bits.yaml").cells) == 2 * 2 * 2 * 3


def test_ci_finds_the_test_command() -> None:
    command = README.split("<!-- tests -->")[1].split("```")[1]
    assert "tox" in command
