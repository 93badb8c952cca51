"""For all tests, before any of them loads torch."""

import os

# With as many workers as processors, and processes of federations beside them, a second thread each only waits for
# the first: spinning, it costs five times the computation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.command_line"]
