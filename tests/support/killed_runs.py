"""A program for test_kills.py: small runs through every stage in forked processes, interrupted again and again until
they end by themselves.

    python killed_runs.py MODEL ROOT KINDS SEED [ROOT KINDS SEED ...]

KINDS, joined by +, are the interruptions of successive processes, each at a moment of its own in one of the stages:
SIGKILL, SIGINT, or `full`, which fills the disk at ROOT until the process has ended. With SEED 0 every stage is
interrupted once, training late enough for a checkpoint, and the newest checkpoint of `pq` is damaged. Otherwise 30
moments are spread over the stages. KINDS `none` is an uninterrupted run, which must come first. The program prints as
JSON, for each root, how each process ended, and in which stage.

Unless PQCAD_KILLS=all is set, images are made of one variant of each kind: in PyTorch and by OpenVINO, shared by runs
and not, in the steps of the sampler and of its student. Baselines are then not tried out in processes of their own,
and reports have no page.

The processes are forked from one that has imported everything and used nothing. Not here: any test.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from tiny_runs import POLICIES, SCHEDULER, tiny_overrides, without_page, without_timed_estimates, without_trials
from torch.nn.modules.module import register_module_forward_pre_hook

from pqcad_qat import cli
from pqcad_qat.commands import run  # noqa: F401 (the whole of it, before any fork)
from pqcad_qat.models.model_loading import save_model
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FLOAT_STEPS,
    FP32,
    NNCF_INT8,
    PQ,
    PQ_DISTILLED,
    PQCAD,
    PQCAD_OPENVINO,
    PTQ,
    STEP_COSTS,
    TRAINED,
    VARIANTS,
    default_variants,
    exporting,
)
from pqcad_qat.stages.run_folder import RunFolder, Stage

ALL = os.environ.get("PQCAD_KILLS") == "all"
MADE = default_variants((PQCAD,)) if ALL else (FP32, NNCF_INT8, FIXED_BIT, PQ_DISTILLED, PQCAD_OPENVINO)
"""Variants of the runs, in the order of the tables; every stage is needed by one of them."""

SMALL = (  # overrides in addition to tiny_runs.TINY
    "sampler.steps=2",
    "distillation.student_steps=1",
    "calibration.refinement=1",
    "calibration.batch_size=1",
    "progressive.steps=4",
    "distillation.steps=3",
    "training.checkpoint_every=1",
    "training.samples_every=0",
    "evaluation.features=none",
    "evaluation.images=4",
    "evaluation.batch_size=1",
    f"evaluation.variants=[{', '.join(MADE)}]",
    "export.latency_runs=1",
)

STAGES = {  # stage -> number of moments in it
    "calibration": 2,
    FLOAT_STEPS: 1,
    STEP_COSTS: 1,
    PTQ: 1,
    PQ: 2,
    FIXED_BIT: 2,
    "teacher": 2,
    PQ_DISTILLED: 2,
    PQCAD: 2,
    exporting(PQCAD): 3,
    "baselines": 2,
    "benchmark": 1,
    **{f"samples-{name}": 1 for name in MADE if VARIANTS[name].sampled},
    "evaluation": 1,
}
EVENTS = "events.json"
"""Name of the file with the number of events of each stage in an uninterrupted run. It lies beside the model, for later
runs.
"""

REPORT = "report"
"""Name for the time after the last stage, treated as a stage."""

ORDER = [*STAGES, REPORT]
FILLER = "filler"
DAMAGED = f"checkpoints/{PQ}/step_000999"
"""A checkpoint without any file, later than all others."""

Moment = tuple[str, str, int]
"""Moment of an interruption: its kind, its stage, and the number of the event. Events are changes of files and denoiser
calls.
"""

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.copyfile", "shutil.rmtree")


@dataclass
class Place:
    """Position of a process: its stage, and the number of events in it."""

    stage: str = "start"
    events: int = 0


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit code (negative for a signal), its output, its stage, and when each stage that was
    finished by then had been, in nanoseconds.
    """

    code: int
    said: str
    stage: str
    finished: Mapping[str, int]


def main() -> None:
    model, chains = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    gc.freeze()  # the forked processes need not collect what is imported
    if not model.exists():
        torch.manual_seed(0)
        save_model(network().eval(), SCHEDULER, model)
    found = []
    with (
        without_timed_estimates(),
        nullcontext() if ALL else without_trials(),
        nullcontext() if ALL else without_page(),
    ):
        for root, kinds, seed in zip(chains[::3], chains[1::3], chains[2::3], strict=True):
            found.append([asdict(ending) for ending in endings(model, Path(root), kinds, int(seed))])
    print(json.dumps(found))


def endings(model: Path, root: Path, kinds: str, seed: int) -> Iterator[Ending]:
    if kinds == "none":
        yield ended(started(model, root, None))
    else:
        yield from cut_off(model, root, kinds.split("+"), seed)


def network() -> UNet2DModel:
    """One level with attention and shortcuts, in as few layers as these take."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return UNet2DModel(in_channels=1, out_channels=1, **blocks, **sizes)


def cut_off(model: Path, root: Path, kinds: Sequence[str], seed: int) -> Iterator[Ending]:
    """Run processes one after another, each interrupted at its moment and resuming the one before; the last one runs to
    the end.
    """
    dice = random.Random(seed)
    events = json.loads((model.parent / EVENTS).read_text())
    stages = [(stage, count) for stage, count in {**STAGES, REPORT: 1}.items() for _ in range(count if seed else 1)]
    for kind, (stage, count) in zip(cycle(kinds), stages, strict=False):
        early = dice.randint(1, max(1, events[stage] // (2 * count)))
        late = not seed and stage in TRAINED
        yield ended(started(model, root, (kind, stage, 3 * events[stage] // 4 if late else early)))
        (root / FILLER).unlink(missing_ok=True)
        if late and stage == PQ:
            (root / "run" / DAMAGED).mkdir()
    yield ended(started(model, root, None))


def meet(kind: str, root: Path) -> None:
    """Interrupt the process."""
    if kind != "full":
        signal.raise_signal(signal.Signals[kind])
        return
    with (root / FILLER).open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()


@dataclass(frozen=True)
class Process:
    number: int
    root: Path


def started(model: Path, root: Path, moment: Moment | None) -> Process:
    """Fork a process that begins or resumes the run, and is interrupted at the moment."""
    number = os.fork()
    if number:
        return Process(number, root)
    code = 1
    try:
        with outputs(model.parent / f"{root.name}.said") as said:
            with watched(moment, root, model.parent / f"{root.name}.place"):
                flags = [f"--set={override}" for override in tiny_overrides(model, *SMALL)]
                # the report names the command
                sys.argv[1:] = ["run", str(POLICIES / "smoke.yaml"), "--out", str(root / "run"), "--resume", *flags]
                try:
                    cli.main(sys.argv[1:])
                    code = 0
                except SystemExit as ended_with:
                    code = int(ended_with.code or 0)
            said.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


@contextmanager
def outputs(file: Path) -> Iterator[Any]:
    """Redirect the output of the process to a file."""
    with file.open("w", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        yield said


@contextmanager
def watched(moment: Moment | None, root: Path, told: Path) -> Iterator[None]:
    """Count events by stage inside the block, and interrupt the process at the moment's event, or at the next event
    after its stage.
    """
    # Stages are observed by wrapping RunFolder.stage, changes of files by an audit hook, and denoiser calls by a hook
    # on every module's forward pass.
    place, sent, events = Place(), False, dict[str, int]()
    stage_of = RunFolder.stage
    told.write_text(place.stage)

    def event() -> None:
        nonlocal sent
        place.events += 1
        events[place.stage] = max(place.events, events.get(place.stage, 0))
        if moment is None or sent or place.stage not in ORDER:
            return
        kind, stage, number = moment
        beyond = ORDER.index(place.stage) - ORDER.index(stage)
        if beyond > 0 or (beyond == 0 and place.events >= number):
            sent = True
            meet(kind, root)

    @contextmanager
    def entered(folder: RunFolder, name: str, together: bool = False) -> Iterator[Stage]:
        place.stage, place.events = name, 0
        told.write_text(name)
        with stage_of(folder, name, together) as stage:
            yield stage
        if name == "evaluation":
            place.stage, place.events = REPORT, 0
            told.write_text(REPORT)

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        writes = name in WRITES or (
            name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(arguments[0]).startswith(f"{root}{os.sep}"):  # not the notes of this program beside it
            event()

    def called(module: torch.nn.Module, _arguments: Any) -> None:
        if isinstance(module, UNet2DModel):
            event()

    RunFolder.stage = entered  # type: ignore[method-assign]
    sys.addaudithook(audit)
    register_module_forward_pre_hook(called)
    yield
    if moment is None and not (told.parent / EVENTS).exists():
        (told.parent / EVENTS).write_text(json.dumps(events))


def ended(process: Process) -> Ending:
    code = os.waitstatus_to_exitcode(os.waitpid(process.number, 0)[1])
    beside = Path(sys.argv[1]).parent / process.root.name
    markers = (process.root / "run" / "stages").glob("*.json")
    finished = {marker.stem: marker.stat().st_mtime_ns for marker in markers}
    said = beside.with_suffix(".said").read_text(encoding="utf-8", errors="replace")
    return Ending(code, said, beside.with_suffix(".place").read_text(encoding="utf-8"), finished)


if __name__ == "__main__":
    main()
