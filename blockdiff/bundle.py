"""What is sent to a host: the modules of the agent as one archive, and the command that starts it.

The same bytes serve hosts behind SSH and local sources, and the tests.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from blockdiff import loader_status

#: The shipped modules, in the order in which they import each other. They need the standard library alone.
SHIPPED = ("errors", "blocks", "pipeline", "wire", "process", "dump", "agent")

NONCE_SIZE = 16

# names under which Python 3 is found, the best first; RHEL's own is not on the PATH
_PYTHONS = (
    "python3 /usr/libexec/platform-python /usr/bin/python3 /usr/local/bin/python3 "
    "python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 python3.7 python3.6"
)
_START = "import sys;exec(bytes.fromhex(sys.argv[2]))"
