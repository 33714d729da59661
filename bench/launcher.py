"""`python launcher.py FILE COMMAND…`: run a command, write what it cost to FILE, and exit with its status.

A process of its own, because Linux counts the memory of whoever starts a program as that program's, too.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    result, *words = sys.argv[1:]
    begun = time.monotonic()
    pid = os.posix_spawnp(words[0], words, os.environ)
    _pid, status, usage = os.wait4(pid, 0)
    cost = {
        "wall_s": time.monotonic() - begun,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss << 10,
    }
    with open(result, "w") as file:
        json.dump(cost, file)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
