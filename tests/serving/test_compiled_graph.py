"""One deployed model, any number of threads, and every device that OpenVINO has here: the same answers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import openvino as ov
import pytest
from deployed_fixture import BATCH, SHAPE, quantized_small

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.compiled_graph import Requests, compile_graph
from pqcad_qat.serving.runtime import OVUNet2DModel

THREADS, CALLS = 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_small({"bits": 4}, {"bits": 8, "symmetric": False}).export(
        tmp_path_factory.mktemp("deployed") / "openvino"
    )


@pytest.fixture(scope="module")
def deployed(folder: Path) -> OVUNet2DModel:
    return OVUNet2DModel.from_pretrained(folder)


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def at_once(call: Callable[[int], Any]) -> list[list[Any]]:
    """What THREADS threads, started together, get of CALLS calls each, numbered through."""
    barrier = Barrier(THREADS)

    def calls(thread: int) -> list[Any]:
        barrier.wait(60)
        return [call(CALLS * thread + number) for number in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(calls, range(THREADS)))


@pytest.mark.parametrize("hint", ["LATENCY", "THROUGHPUT"])
def test_sixteen_threads_on_one_model_get_the_answers_of_one(folder: Path, hint: str) -> None:
    model = OVUNet2DModel.from_pretrained(folder, properties={"PERFORMANCE_HINT": hint})

    def call(number: int) -> np.ndarray:
        answer: np.ndarray = model(noise(number, 1 + number % 5), number * 7 % 1000).sample
        return answer

    alone = [call(number) for number in range(THREADS * CALLS)]
    assert (alone[0] != alone[5]).any()
    for number, answer in enumerate(answer for answers in at_once(call) for answer in answers):
        np.testing.assert_array_equal(answer, alone[number])


def test_one_thread_keeps_one_request_and_a_call_that_raises_gives_it_back(deployed: OVUNet2DModel) -> None:
    created: list[ov.InferRequest] = []

    class Counted:
        def create_infer_request(self) -> ov.InferRequest:
            created.append(deployed.compiled.create_infer_request())
            return created[-1]

    requests = Requests(Counted())  # type: ignore[arg-type]
    inputs = {"sample": noise(0, BATCH), "timestep": np.array([5, 700])}
    (first,) = requests.infer(inputs, [0])
    for _ in range(3):
        with pytest.raises(ModelError, match="OpenVINO cannot run the graph: "):
            requests.infer({"sample": noise(0, BATCH + 1)}, [0])
        with pytest.raises(ModelError, match="OpenVINO cannot run the graph: "):
            requests.infer(inputs, ["no such output"])
        np.testing.assert_array_equal(requests.infer(inputs, [0])[0], first)
    assert len(created) == 1


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU"])
def test_devices_that_hand_on_to_the_cpu_give_its_answers(folder: Path, deployed: OVUNet2DModel, device: str) -> None:
    model = OVUNet2DModel.from_pretrained(folder, device, {"INFERENCE_PRECISION_HINT": "f32"})
    assert (model.compiled_for, model.inference_precision) == ("CPU", "f32")
    chosen = OVUNet2DModel.from_pretrained(folder, device)
    assert chosen.inference_precision == deployed.inference_precision
    np.testing.assert_array_equal(chosen.predict(noise(3, 3), 40), deployed.predict(noise(3, 3), 40))


@pytest.mark.parametrize(
    "device", ["GPU.7", "NPU.7", "", "cpu", "CPU,GPU.7", "AUTO:GPU.7", "MULTI:GPU.7,CPU", "HETERO", None, "x" * 9999]
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(device: Any) -> None:
    data = ov.opset13.parameter([1], np.float32)
    with pytest.raises(
        ModelError, match=r"^device: got .*; allowed CPU.*, AUTO, AUTO:CPU, MULTI:CPU, .*: OpenVINO has CPU"
    ) as told:
        compile_graph(ov.Model([ov.opset13.result(data)], [data]), ov.Core(), device)
    assert len(str(told.value)) < 4000
