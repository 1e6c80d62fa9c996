"""The library that the stage scripts read like sentences from. See README.md for the tour."""

import os

# Threads that wait for each other do so asleep after a moment. By default they keep their cores busy all the while:
# beside one other busy program a step then takes many times as long. Read when torch is loaded, hence before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
