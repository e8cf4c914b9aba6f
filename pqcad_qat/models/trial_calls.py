"""Trial calls of modules that are built from configs, to see that they work: one for each config in a process.

Not here: how such a module is built (model_loading.py, pipeline_parts.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

_SUCCEEDED: set[str] = set()
"""What was passed as `built_from` to the calls that succeeded, as JSON."""


def try_call(call: Callable[[], object], *built_from: object) -> None:
    """Make a call without gradients, unless one has succeeded for the same `built_from`.

    On torch's meta device the call of a small model takes a tenth of a second, and that of a large one seconds.

    Args:
        call: calls a module on inputs that follow from its config.
        built_from: JSON values that decide the module and its inputs.
    """
    key = json.dumps(built_from, sort_keys=True)
    if key not in _SUCCEEDED:
        with torch.no_grad():
            call()
        _SUCCEEDED.add(key)
