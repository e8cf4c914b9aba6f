"""The family of a user's own plain module: it has no diffusers class, and is called as `module(x_t, t, **condition)`.

Not here: how such a module is described and built (models/own_model.py).
"""

from __future__ import annotations

from typing import Any

from pqcad_qat.models.families.family import Family


def _called(denoiser: Any, x_t: Any, t: Any, condition: dict[str, Any]) -> Any:
    return denoiser(x_t, t, **condition)


OWN_MODULE = Family(name="", part="unet", parameters=(), call=_called)
"""Family of every user module. The OwnModel declares its conditions, which follow x_t and t in a call by position."""
