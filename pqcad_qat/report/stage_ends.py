"""What became of each training stage, in words: why it ended, which weights it kept, and what held-out states say.

Not here: the decision (training/stopping_rule.py), and the page (page.py).
"""

from __future__ import annotations

from pqcad_qat.training.stage_end import StageEnd

WIDE_GAP = 1.25
"""Factor by which the loss of held-out states may rise over that of trained ones during a stage before it is named."""

_CAUSES = {
    "steps": "its number of steps was given",
    "plateau": "the held-out loss had stopped improving",
    "max_steps": "training.max_steps allows no more",
    "minutes": "its share of training.minutes was used up",
}
_KEPT = {
    "average": "the moving average of the weights was kept",
    "last": "the last weights were kept, whose images are better than those of their moving average",
    "best": "the weights of the lowest held-out loss were kept, since it had risen again",
    "start": "the weights that the stage was given were kept, since training had made their images worse",
}

_WEIGHTS = {
    "average": "moving average",
    "last": "last weights",
    "best": "weights of the lowest held-out loss",
    "start": "weights that it was given",
}


def end_sentence(stage: str, end: StageEnd) -> str:
    """Why a stage ended, which weights it kept, and a gap between trained and held-out states where it is wide."""
    start, kept = end.held_out.get("start"), end.held_out.get(end.kept)
    change = "" if start is None or kept is None else f", held-out loss {start:.3g} to {kept:.3g}"
    given, now = end.images.get("start"), end.images.get(end.kept)
    if given is not None and now is not None:
        change += f", held-out images {given:.1f} to {now:.1f} dB"
    text = f"{stage} ended after {end.steps} steps, because {_CAUSES[end.cause]}; {_KEPT[end.kept]}{change}."
    text += _passed_over(end) + _found_rate(end)
    gap = held_out_gap(end)
    if gap is None or gap <= WIDE_GAP:
        return text
    return (
        f"{text} Held-out states have {gap:.2f} times the loss of trained ones, as compared with the start: the stage "
        "learns its trajectories by heart, and more calibration.trajectories would help."
    )


def _passed_over(end: StageEnd) -> str:
    """Which weights have nearer images and were not kept, since the images as a set moved away; empty for none."""
    psnrs = {kind: psnr for kind, psnr in end.images.items() if psnr is not None}
    nearest = max(psnrs, key=lambda kind: psnrs[kind], default=end.kept)
    before, after = end.distances.get("start"), end.distances.get(nearest)
    if psnrs.get(nearest, 0.0) <= psnrs.get(end.kept, 0.0) or before is None or after is None:
        return ""
    return (
        f" Images of the {_WEIGHTS[nearest]} are nearer one by one, {psnrs[nearest]:.1f} dB, but as a set they have "
        f"moved away from full precision's: their patches are {after / before:.1f} times as far as at the start."
    )


def _found_rate(end: StageEnd) -> str:
    """How the learning rate was found; empty where it was given."""
    if not end.rate_trials:
        return ""
    losses = (f"{trial.rate:g} ({_loss_text(trial.held_out)})" for trial in end.rate_trials)
    return (
        f" Its learning rate is {end.learning_rate:g}, by the held-out loss after {end.trial_steps} training steps at "
        f"each of {', '.join(losses)}."
    )


def _loss_text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3g}"


def held_out_gap(end: StageEnd) -> float | None:
    """Held-out loss over trained loss of the kept weights, as a multiple of the same ratio at the start.

    At the start neither kind of state was trained on, so that their ratio says which kind is harder. None where a loss
    is unknown or 0.
    """
    losses = (end.held_out.get(end.kept), end.trained.get("kept"), end.held_out.get("start"), end.trained.get("start"))
    held_out, trained, held_out_start, trained_start = losses
    if not held_out or not trained or not held_out_start or not trained_start:
        return None
    return (held_out / trained) / (held_out_start / trained_start)
