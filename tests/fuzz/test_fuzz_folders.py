"""Damaged deployed folders: whatever their files hold, they load as what they say, or one error tells what is wrong."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import FUZZ, bounded
from hypothesis import given
from hypothesis import strategies as st
from tiny_deployed import BATCH, PICTURE, SHAPE, TOKENS, WIDTH, resealed, tiny_deployed

from pqcad_qat.errors import PqcadError
from pqcad_qat.serving.deployed_folder import MANIFEST
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.text_to_image import TextToImage
from pqcad_qat.stages.samplers import open_folder

LONGEST_MESSAGE = 4000

NUMBERS = (0, 1, -1, 3, 0.5, -0.0, 1e308, 10**9, 2**63, 10**40, float("nan"), float("inf"))
TEXTS = (
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "int8",
    "unet",
    "DDIMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [0],
    [1, 2, 3],
    [10**9] * 3,
    [1, "x", None],
    {"a": 1},
    [[1]] * 50,
)

JUNK = st.sampled_from((*NUMBERS, *TEXTS, *OTHERS))
"""Values that stand in a JSON file where others should."""

ATTRIBUTES = st.sampled_from(
    (b"", b"0", b"-1", b"1", b"2", b"99999999999", str(2**64 - 1).encode(), b"nan", b"x", b"1,2", b"i64", b"u2")
)
"""Of a graph's text."""

Damage = Callable[[bytes, st.DataObject], bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deployed")
    return {name: tiny_deployed(folder / name, name) for name in ("int8", "packed")}


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in ((content, key), *places(content[key]))]


def damaged_json(content: bytes, data: st.DataObject) -> bytes:
    document = json.loads(content)
    for _ in range(data.draw(st.integers(1, 2))):
        if found := places(document):
            container, key = data.draw(st.sampled_from(found))
            match data.draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"])):
                case "replace":
                    container[key] = copy.deepcopy(data.draw(JUNK))
                case "delete":
                    del container[key]
                case _ if isinstance(container, dict):
                    container[data.draw(st.text(max_size=9))] = container.pop(key)
    return json.dumps(document).encode()


def damaged_graph(content: bytes, data: st.DataObject) -> bytes:
    packed = content[:2] == b"\x1f\x8b"
    text = bytearray(gzip.decompress(content) if packed else content)
    kind = data.draw(
        st.sampled_from(
            [rb'="([^"]*)"', rb"<dim>([^<]*)</dim>", rb"(<edge [^>]*/>|<layer .*?</layer>|<port .*?</port>)"]
        )
    )
    found = data.draw(st.sampled_from(list(re.finditer(kind, bytes(text), re.DOTALL))))
    other = data.draw(st.sampled_from(list(re.finditer(kind, bytes(text), re.DOTALL))))
    text[found.start(1) : found.end(1)] = data.draw(st.one_of(st.just(other.group(1)), ATTRIBUTES))
    return gzip.compress(bytes(text)) if packed else bytes(text)


def damaged_bytes(content: bytes, data: st.DataObject) -> bytes:
    place = data.draw(st.integers(0, len(content)))
    more = data.draw(st.binary(max_size=8))
    return content[:place] + more + (b"" if data.draw(st.booleans()) else content[place + len(more) :])


def damage(folder: Path, data: st.DataObject) -> str:
    """Spoil one file of the folder in one way; which, and how."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from([*names, *[MANIFEST] * len(names)]))
    path = folder / name
    ways: list[Damage] = [damaged_bytes]
    ways += [damaged_json] * 4 if path.suffix == ".json" else [damaged_graph] * 4 if ".xml" in name else []
    way = data.draw(st.sampled_from(ways))
    path.write_bytes(way(path.read_bytes(), data))
    if name != MANIFEST and data.draw(st.integers(0, 9)):
        resealed(folder, name)
    return f"{name}, {way.__name__}"


def tried(use: Callable[[], Any], what: str) -> Any:
    """What a use gives, or None where it ends in one error of ours."""
    try:
        with bounded():
            return use()
    except PqcadError as error:
        message = str(error)
        assert 10 < len(message) < LONGEST_MESSAGE, what
        message.encode()
        return None


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_fuzz_a_damaged_folder_is_loaded_or_refused_with_what_is_wrong(
    whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parent = tmp_path_factory.mktemp("damaged", numbered=True)
    try:
        folder = Path(shutil.copytree(whole[data.draw(st.sampled_from(["int8", "packed"]))], parent / "it"))
        what = damage(folder, data)
        before = {path: path.stat().st_size for path in parent.rglob("*")}
        match data.draw(st.sampled_from(["model", "pipeline", "sample"])):
            case "model":
                if (model := tried(lambda: OVUNet2DModel.from_pretrained(folder), what)) is not None:
                    x, text = np.zeros((BATCH, *SHAPE), np.float32), np.zeros((BATCH, TOKENS, WIDTH), np.float32)
                    answer = tried(lambda: model(x, 0, text).sample, what)
                    assert answer is None or answer.shape == x.shape
            case "pipeline":
                if (pipeline := tried(lambda: TextToImage.from_pretrained(folder), what)) is not None:
                    picture = tried(lambda: pipeline("a cat"), what)
                    assert picture is None or picture.shape == PICTURE
            case _:
                tried(lambda: open_folder(str(folder)), what)
        assert {path: path.stat().st_size for path in parent.rglob("*")} == before
    finally:
        shutil.rmtree(parent)
