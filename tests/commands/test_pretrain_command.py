"""Pretraining on scikit-learn's digits: the folder it leaves, its resume, what it trains on, and refusals.

Not here: the loop (test_trainer.py), the images (test_images.py).
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES

from pqcad_qat import cli, console
from pqcad_qat.commands.pretrain import pretrain
from pqcad_qat.data.images import load_images, to_float
from pqcad_qat.errors import CheckpointError, ModelError, PolicyError, PqcadError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.sampling.ddim import split_prediction
from pqcad_qat.sampling.ddpm_schedule import ddpm_schedule
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.pretraining import ClassLabels, noisy_batches

SHIPPED = POLICIES / "pretrain-fashion-mnist.yaml"
MODEL = (
    "model={sample_size: 8, block_out_channels: [8, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], attention_head_dim: 16, norm_num_groups: 8}"
)
TINY = (
    "name=digits",
    "data.source=digits",
    "data.size=8",
    MODEL,
    "training.precision=fp32",
    "training.steps=8",
    "training.batch_size=16",
)
EVERY = (
    "training.warmup=2",
    "training.checkpoint_every=2",
    "training.keep_checkpoints=10",
    "training.sample_every=4",
    "training.ema=0.9",
)

WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"


def tiny(*more: str) -> PretrainPolicy:
    return load_pretrain_policy(SHIPPED, [*TINY, *EVERY, *more])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished pretraining run."""
    path = tmp_path_factory.mktemp("pretrain") / "digits"
    assert pretrain(tiny(), path, quiet()) == path / "model"
    return path


def test_the_result_is_a_diffusers_folder_that_our_loader_takes(trained: Path) -> None:
    model = load_model(str(trained / "model"))
    assert model.sample_shape == (1, 8, 8)
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.scheduler_config["timestep_spacing"] == "trailing"
    assert model.scheduler_config["num_train_timesteps"] == 1000
    assert model.scheduler_config["clip_sample"] is False
    with torch.no_grad():
        assert torch.isfinite(predict(model.denoiser, *model.example)).all()


def test_a_class_conditional_model_is_trained_with_some_labels_dropped_to_the_one_of_no_class(tmp_path: Path) -> None:
    policy = tiny()
    policy = policy.model_copy(update={"model": {**policy.model, "num_class_embeds": 11}})
    model = load_model(str(pretrain(policy, tmp_path / "classes", quiet())))
    assert [str(wanted) for wanted in model.condition_inputs] == ["class_labels () int64 in [0, 11)"]
    images = load_images("digits", None, 8)
    batch = noisy_batches(images, ddpm_schedule(model.scheduler_config), 512, 0, classes=ClassLabels(10, 0.25))(0)
    plain = noisy_batches(images, ddpm_schedule(model.scheduler_config), 512, 0)(0)
    assert all(torch.equal(batch[name], value) for name, value in plain.items())
    dropped = float((batch["condition.class_labels"] == 10).float().mean())
    assert 0.15 < dropped < 0.35


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (
            {"num_class_embeds": 7},
            r"model\.num_class_embeds: got 7; allowed 10, the classes of digits 8x8, or 11, with no class",
        ),
        ({"class_embed_type": "timestep"}, r"model\.class_embed_type: got 'timestep'; allowed null"),
    ],
)
def test_a_table_of_labels_that_does_not_fit_the_data_is_refused(
    keys: dict[str, object], fault: str, tmp_path: Path
) -> None:
    policy = tiny()
    policy = policy.model_copy(update={"model": {**policy.model, **keys}})
    with pytest.raises(PolicyError, match=fault):
        pretrain(policy, tmp_path / "classes", quiet())


def test_the_averaged_weights_are_kept(trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_000008"
    kept, averaged, own = (
        load_file(trained / WEIGHTS),
        load_file(checkpoint / "ema.safetensors"),
        load_file(checkpoint / "model.safetensors"),
    )
    assert all(torch.equal(kept[name], value) for name, value in averaged.items())
    assert not torch.equal(kept["conv_in.weight"], own["conv_in.weight"])


def test_sample_grids_are_written_on_the_way(trained: Path) -> None:
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step_000004.png", "step_000008.png"]
    with Image.open(trained / "samples" / "step_000008.png") as grid:
        assert grid.size == (12 * (8 * 9 - 1), 12 * (8 * 9 - 1))


def test_the_provenance_names_the_data_by_digest_the_policy_and_the_versions(trained: Path) -> None:
    found = json.loads((trained / "model" / "provenance.json").read_text())
    assert found["data"]["sha256"] == load_images("digits", None, 8).digest
    assert found["policy"] == tiny().model_dump(mode="json")
    assert set(found["versions"]) == {"torch", "diffusers", "accelerate"}


def test_every_step_is_logged(trained: Path) -> None:
    rows = read_metrics(trained / "logs" / "pretrain.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["learning_rate"] < rows[2]["learning_rate"]


def test_a_run_that_was_killed_after_a_checkpoint_ends_with_the_same_weights_bit_for_bit(
    trained: Path, tmp_path: Path
) -> None:
    killed = Path(shutil.copytree(trained, tmp_path / "digits"))
    for step in (4, 6, 8):
        shutil.rmtree(killed / "checkpoints" / f"step_{step:06d}")
    shutil.rmtree(killed / "model")
    console = quiet()
    pretrain(tiny(), killed, console, resume=True)
    assert isinstance(console.file, io.StringIO)
    assert "going on from step 2" in console.file.getvalue()
    whole, resumed = load_file(trained / WEIGHTS), load_file(killed / WEIGHTS)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert read_metrics(killed / "logs" / "pretrain.jsonl") == read_metrics(trained / "logs" / "pretrain.jsonl")


def test_a_damaged_last_checkpoint_is_told_and_the_one_before_it_used(trained: Path, tmp_path: Path) -> None:
    killed = Path(shutil.copytree(trained, tmp_path / "digits"))
    file = killed / "checkpoints" / "step_000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    console = quiet()
    pretrain(tiny(), killed, console, resume=True)
    assert isinstance(console.file, io.StringIO)
    printed = " ".join(console.file.getvalue().split())
    assert "warning:" in printed
    assert "going on from step 6" in printed
    assert load_file(killed / WEIGHTS)["conv_in.bias"].equal(load_file(trained / WEIGHTS)["conv_in.bias"])


def test_a_finished_run_is_refused_without_resume(trained: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run already"):
        pretrain(tiny(), trained, quiet())


def test_another_policy_trains_anew_as_a_new_run_does_and_what_was_trained_is_moved_aside(
    trained: Path, tmp_path: Path
) -> None:
    changed, console = Path(shutil.copytree(trained, tmp_path / "digits")), quiet()
    pretrain(tiny("training.seed=1"), changed, console, resume=True)
    assert isinstance(console.file, io.StringIO)
    assert "again: pretrain (training.seed 0 -> 1)" in console.file.getvalue()
    pretrain(tiny("training.seed=1"), tmp_path / "new", quiet())
    for one, other in ((changed, tmp_path / "new"), (changed / "superseded" / "pretrain-1", trained)):
        found, wanted = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_finished_run_that_goes_on_with_checkpoints_at_other_steps_trains_nothing(
    trained: Path, tmp_path: Path
) -> None:
    path, console = Path(shutil.copytree(trained, tmp_path / "digits")), quiet()
    pretrain(tiny("training.checkpoint_every=3", "training.sample_every=5"), path, console, resume=True)
    assert isinstance(console.file, io.StringIO)
    assert "again" not in console.file.getvalue()
    assert "going on from step 8" in console.file.getvalue()


def test_a_model_that_diffusers_refuses_is_the_policys_fault_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PqcadError, match="model: got a config that diffusers refuses"):
        pretrain(tiny("model.block_out_channels=[8]"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_model_whose_sizes_do_not_fit_is_the_policys_fault_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"model: got a UNet2DModel that cannot be called on images of \d+ pixels"):
        pretrain(tiny("model.attention_head_dim=64"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_channels_than_the_images_is_the_policys_fault(tmp_path: Path) -> None:
    more = MODEL.replace("}", ", in_channels: 3, out_channels: 3}")
    with pytest.raises(PqcadError, match=r"model\.in_channels: got 3; allowed 1, as the images have"):
        pretrain(tiny(more), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        pretrain(tiny("data.source=folder", "data.path=nowhere"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_says_where_the_model_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200))
    flags = [f"--set={override}" for override in (*TINY, "training.steps=1", "training.warmup=0")]
    cli.main(["pretrain", str(SHIPPED), "--out", str(tmp_path / "run"), *flags])
    assert capsys.readouterr().out.endswith(f"model: {tmp_path / 'run' / 'model'}\n")
    assert load_model(str(tmp_path / "run" / "model")).sample_shape == (1, 8, 8)


# ---- batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_batch_is_noised_images_and_the_prediction_that_gives_them_back(prediction_type: str) -> None:
    images = load_images("digits", None, 8)
    schedule = ddpm_schedule({"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type})
    batch = noisy_batches(images, schedule, 16, seed=0)(3)
    alpha_bar = torch.from_numpy(schedule.alpha_bar)[batch["t"]].float().view(-1, 1, 1, 1)
    x_0, eps = split_prediction(batch["target"], batch["x_t"], alpha_bar, schedule.prediction_type)
    clean = (batch["t"] < 900).nonzero().flatten()  # beyond, x_0 from epsilon is a division by almost nothing
    known = to_float(images.images)
    for row in clean:
        assert (known - x_0[row]).abs().amax(dim=(1, 2, 3)).min() < 1e-3
    assert abs(float(eps.mean())) < 0.15
    assert abs(float(eps.std()) - 1) < 0.15


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    images, schedule = load_images("digits", None, 8), ddpm_schedule({})
    first, again = noisy_batches(images, schedule, 4, 0), noisy_batches(images, schedule, 4, 0)
    first(0)
    assert all(torch.equal(first(7)[name], value) for name, value in again(7).items())
    assert not torch.equal(first(7)["x_t"], first(8)["x_t"])
    assert not torch.equal(first(7)["x_t"], noisy_batches(images, schedule, 4, 1)(7)["x_t"])


def test_every_batch_has_one_time_step_in_each_equal_part_of_the_schedule() -> None:
    batches = noisy_batches(load_images("digits", None, 8), ddpm_schedule({}), 10, seed=0)
    for step in range(20):
        assert np.array_equal(np.sort(batches(step)["t"].numpy()) // 100, np.arange(10))
