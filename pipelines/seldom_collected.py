"""Imported first in a process of pbkd's own, which then looks for garbage seldom.

Importing torch makes a million objects and no garbage: looking for it was a quarter of `pbkd plan`, and of
the start of processes that train.
"""

import atexit
import gc

gc.set_threshold(20_000, 10, 10)
atexit.register(gc.freeze)
