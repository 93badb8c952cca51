"""No core dumps: a crash leaves no pictures, updates or keys on the disk, and no process of the same user reads them.

Standard library alone.
"""

import ctypes
import os
import resource
import sys

PR_SET_DUMPABLE = 4  # linux/prctl.h


def forbid_dumps() -> None:
    """Forbid core files of this process and of those that it starts.

    On Linux it is not dumpable either, so a handler that the system pipes cores to gets none, and other processes of
    the user cannot attach to it or read its memory. That ends where another program is executed, so ours call this
    themselves.

    Raises:
        OSError: the system refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
