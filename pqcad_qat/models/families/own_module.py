"""A plain module of the user's own: it is of no class of diffusers, and called as `module(x_t, t, **condition)`.

Not here: how such a module is made known (models/own_model.py).
"""

from __future__ import annotations

from typing import Any

from pqcad_qat.models.families.family import Family


def _called(denoiser: Any, x_t: Any, t: Any, condition: dict[str, Any]) -> Any:
    return denoiser(x_t, t, **condition)


OWN_MODULE = Family(name="", part="unet", parameters=(), call=_called)
"""Its conditions are those of its OwnModel, and its arguments follow x_t and t by place."""
