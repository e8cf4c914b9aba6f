"""What Python imports first in every process that a test starts, since it looks for a module of this name by itself.

Garbage is collected seldom there too, as in the tests' own process (../seldom_collected.py): a quarter of the time that
a process takes to import torch went into collections. Not here: what a test's own folder of this kind does in its
place (test_processes.py).
"""

from __future__ import annotations

import gc

gc.set_threshold(100_000, 20, 20)
