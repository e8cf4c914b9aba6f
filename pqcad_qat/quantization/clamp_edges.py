"""Where a quantizer of one scale starts to clamp, in units of what it quantizes: to the last bit, and in no more than
some microseconds.

Not here: quantizing, and what is done with the edges (fake_quantization.py). In plain Python: between two convolutions
all code is out of cache, and the least of it is what is fastest.
"""

from __future__ import annotations

import math
from struct import Struct

LARGEST = 2**8
"""As many integers as bounds may hold. A bit more, and the sum with the zero point is rounded twice as coarsely: a
search twice as long.
"""
_FLOAT, _INT = Struct("f"), Struct("i")
_FLOAT_MAX = 3.4e38


def clamp_edges(scale: float, zero_point: float, bounds: tuple[int, int]) -> tuple[float, float]:
    """The largest float32 whose integer is below ``bounds`` and the smallest whose integer is above.

    The integer of x is round(x / scale + zero_point), every operation in float32, as PyTorch computes it. scale: a
    float32, positive;
    zero_point: within the bounds. What is NaN or infinite clamps nothing.
    """
    if not (scale * LARGEST < _FLOAT_MAX and math.isfinite(zero_point)):
        return -math.inf, math.inf
    return _edge(bounds[0] - 0.5, scale, zero_point, bounds), _edge(bounds[1] + 0.5, scale, zero_point, bounds)


def _edge(middle: float, scale: float, zero_point: float, bounds: tuple[int, int]) -> float:
    """The number next to the grid on the far side of ``middle``, which lies half an integer beyond its end."""
    lowest, highest = bounds
    # a sum so near the middle is rounded to it: fewer steps
    half_ulp = math.ldexp(math.copysign(1.0, middle), math.frexp(middle)[1] - 25)
    bits = _bits((middle - half_ulp - zero_point) * scale)
    while lowest <= _integer(bits, scale, zero_point) <= highest:
        bits += 1
    while not lowest <= _integer(bits - 1, scale, zero_point) <= highest:
        bits -= 1
    return _float(bits)


def _integer(bits: int, scale: float, zero_point: float) -> int:
    # a quotient or sum of two float32 numbers is rounded to float32 right by way of float64
    return round(_rounded(_rounded(_float(bits) / scale) + zero_point))


def _rounded(x: float) -> float:
    found: float = _FLOAT.unpack(_FLOAT.pack(x))[0]
    return found


def _bits(x: float) -> int:
    """Of a float32, as an integer that grows as the number moves away from 0."""
    found: int = _INT.unpack(_FLOAT.pack(x))[0]
    return found


def _float(bits: int) -> float:
    found: float = _FLOAT.unpack(_INT.pack(bits))[0]
    return found
