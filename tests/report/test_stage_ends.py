"""What became of a training stage, in words.

Not here: the decisions (tests/training/), and the page (test_report_files.py).
"""

from __future__ import annotations

from dataclasses import replace

from pqcad_qat.policy.variants import PQ
from pqcad_qat.report.stage_ends import end_sentence
from pqcad_qat.training.stage_end import RateTrial, StageEnd

END = StageEnd(
    steps=210,
    cause="plateau",
    kept="last",
    held_out={"start": 0.5, "average": 0.26, "last": 0.25},
    images={"start": 20.0, "average": 29.0, "last": 30.04},
    distances={"start": 0.2, "average": 0.19, "last": 0.1},
    trained={"start": 0.5, "kept": 0.24},
)


def test_a_stage_says_why_it_ended_and_what_it_kept() -> None:
    assert end_sentence(PQ, END) == (
        f"{PQ} ended after 210 steps, because the held-out loss had stopped improving; the last weights were kept, "
        "whose images are better than those of their moving average, held-out loss 0.5 to 0.25, held-out images 20.0 "
        "to 30.0 dB."
    )


def test_trajectories_learned_by_heart_are_named() -> None:
    assert "2.50 times the loss" in end_sentence(PQ, replace(END, trained={"start": 0.5, "kept": 0.1}))


def test_nearer_images_that_were_passed_over_are_named_with_the_reason() -> None:
    moved = replace(
        END, kept="start", trained={"start": 0.5, "kept": 0.5}, distances={"start": 0.2, "average": 0.3, "last": 0.3}
    )
    assert end_sentence(PQ, moved).endswith(
        "Images of the last weights are nearer one by one, 30.0 dB, but as a set they have moved away from full "
        "precision's: their patches are 1.5 times as far as at the start."
    )


def test_what_was_not_measured_is_left_out() -> None:
    assert "dB" not in end_sentence(PQ, replace(END, images={}, distances={}))


def test_a_learning_rate_that_was_found_is_told_with_what_was_tried() -> None:
    trials = (RateTrial(1e-4, 0.31), RateTrial(3e-5, 0.2), RateTrial(1e-5, None))
    assert end_sentence(PQ, replace(END, learning_rate=3e-5, rate_trials=trials)).endswith(
        " Its learning rate is 3e-05, by the held-out loss after 20 training steps at each of 0.0001 (0.31), 3e-05 "
        "(0.2), 1e-05 (diverged)."
    )
    assert "learning rate" not in end_sentence(PQ, replace(END, learning_rate=3e-5))
