"""What is imported first: garbage is collected seldom, while libraries are imported and while tests run.

A quarter of the imports' time went into collections, which find nothing there. Not here: what conftest.py leaves out of
collections altogether.
"""

from __future__ import annotations

import gc

gc.set_threshold(100_000, 20, 20)
