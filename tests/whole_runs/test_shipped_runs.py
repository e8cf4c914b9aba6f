"""The policies that ship for models that do not, each run whole on a small pipeline of its model's layout.

Not here: what each plans at full size (test_large_policies.py), and what deployed pipelines do (test_flow_runs.py,
test_text_runs.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from tiny_runs import POLICIES, without_images
from vnni_here import exact_or_excused

from pqcad_qat.policy.variants import OV_BF16, PQ

pytest.importorskip("transformers")

from safetensors.torch import load_file
from shipped_runs import LAYOUTS, run_of, shipped_run

from pqcad_qat.policy.loading import load_policy


def test_every_policy_for_a_model_that_does_not_ship_is_run() -> None:
    loaded = {path.stem: load_policy(path) for path in POLICIES.glob("*.yaml") if not path.stem.startswith("pretrain")}
    assert LAYOUTS.keys() == {
        name for name, policy in loaded.items() if not policy.model.source.startswith("embedded:")
    }


def long_but(names: Iterable[str], short: Collection[str]) -> list[Any]:
    """Parameters that `tox -e long` alone tries, but for some."""
    return [pytest.param(name, marks=() if name in short else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", long_but(LAYOUTS, ("w4a8-dit", "w8a8-pixart", "w8a8-sd15")))
def test_each_goes_through_training_distillation_export_and_proof(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = shipped_run(name, tmp_path_factory)
    report = whole.report
    execution = report["execution"]
    assert execution["executed_int8"] == execution["planned"] == exact_or_excused(report) > 10
    assert {row["name"] for row in report["variants"]} >= {*whole.policy.variants} - {OV_BF16}


ONE_OF_EACH = {layout: name for name, layout in reversed(LAYOUTS.items())}


@pytest.mark.parametrize("name", long_but(ONE_OF_EACH.values(), (ONE_OF_EACH["dit"],)))
def test_one_of_each_layout_trains_alone_to_the_same_weights(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With activations computed again if they were not, or kept if they were. Layouts decide which modules do that."""
    whole = shipped_run(name, tmp_path_factory)
    other, trained = str(not whole.policy.training.activation_checkpointing).lower(), whole.path.with_name("trained")
    only = (f"training.activation_checkpointing={other}", f"evaluation.variants=[{PQ}]")
    with without_images():
        run_of(name, whole.source, trained, *only)
    one, two = (load_file(path / "models" / f"{PQ}.safetensors") for path in (whole.path, trained))
    assert [key for key, value in one.items() if not value.equal(two[key])] == []
