"""Work that is gathered in parts goes on behind the last one, and a file is whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.errors import InterruptedByUserError
from pqcad_qat.machine.tensor_files import gathered, save_tensors

ROWS = torch.arange(14, dtype=torch.float32).reshape(7, 2)
WHAT = "calibration: trajectories"


def source(
    begun: list[int], stop: type[BaseException] | None = None, after: int = 0
) -> Callable[[int, int], dict[str, Tensor]]:
    """Batches of two rows; notes where each begins, and ends with an error after so many of them."""

    def batch(first: int, count: int) -> dict[str, Tensor]:
        if stop is not None and len(begun) == after:
            raise stop("cut off")
        begun.append(first)
        return {"rows": ROWS[first : first + count], "doubled": 2 * ROWS[first : first + count]}

    return batch


def whole(parts: Path | None, begun: list[int]) -> dict[str, Tensor]:
    return gathered(parts, 7, 2, source(begun), work=WHAT)


def test_all_rows_come_in_order_with_parts_and_without(tmp_path: Path) -> None:
    for parts in (None, tmp_path / "parts"):
        found = whole(parts, [])
        assert torch.equal(found["rows"], ROWS)
        assert torch.equal(found["doubled"], 2 * ROWS)


def test_work_that_failed_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    begun: list[int] = []
    with pytest.raises(ValueError, match="cut off"):
        gathered(tmp_path, 7, 2, source(begun, ValueError, after=2), work=WHAT)
    left: list[int] = []
    found = gathered(tmp_path, 7, 2, source(begun), work=WHAT, advance=left.append)
    assert begun == [0, 2, 4, 6]
    assert left == [4]
    assert torch.equal(found["rows"], ROWS)
    whole(tmp_path, begun)
    assert begun == [0, 2, 4, 6]  # nothing is left to do


def test_whoever_interrupts_is_told_how_much_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InterruptedByUserError, match=r"^interrupted in calibration: 4 of 7 trajectories are kept$"):
        gathered(tmp_path, 7, 2, source([], KeyboardInterrupt, after=2), work=WHAT)
    with pytest.raises(KeyboardInterrupt):
        gathered(None, 7, 2, source([], KeyboardInterrupt, after=2), work=WHAT)


@pytest.mark.parametrize("keep", [0, 7, -3])
def test_a_damaged_part_and_those_behind_it_are_made_again(keep: int, tmp_path: Path) -> None:
    whole(tmp_path, [])
    second = sorted(tmp_path.iterdir())[1]
    second.write_bytes(second.read_bytes()[:keep])
    (tmp_path / ".rows-000000006.safetensors.17").write_text("half")
    begun: list[int] = []
    found = whole(tmp_path, begun)
    assert begun == [2, 4, 6]
    assert torch.equal(found["rows"], ROWS)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_parts_behind_a_missing_one_are_made_again(tmp_path: Path) -> None:
    whole(tmp_path, [])
    sorted(tmp_path.iterdir())[1].unlink()
    begun: list[int] = []
    assert torch.equal(whole(tmp_path, begun)["rows"], ROWS)
    assert begun == [2, 4, 6]


def test_what_goes_on_has_the_layout_in_memory_of_what_was_never_cut_off(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    found = [
        gathered(parts, 4, 2, lambda first, count: {"x": images[first : first + count]}, work=WHAT)["x"]
        for parts in (None, tmp_path)
    ]
    again = gathered(tmp_path, 4, 2, lambda *_: pytest.fail("made again"), work=WHAT)["x"]
    assert {tensor.stride() for tensor in (*found, again)} == {(192, 64, 8, 1)}
    assert torch.equal(found[0], again)


def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors({"x": ROWS}, tmp_path / "file.safetensors")

    def fail(_tensors: dict[str, Tensor], path: Path, _notes: object) -> None:
        path.write_bytes(b"half")
        raise ValueError("no")

    monkeypatch.setattr("pqcad_qat.machine.tensor_files.save_file", fail)
    with pytest.raises(ValueError, match="no"):
        save_tensors({"x": 2 * ROWS}, tmp_path / "file.safetensors")
    assert torch.equal(load_file(tmp_path / "file.safetensors")["x"], ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
