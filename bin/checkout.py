"""Let the commands in this folder run from a checkout: find its virtual environment and its package."""

import importlib.util
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_VENV = os.path.join(_ROOT, ".venv")
_PYTHON = os.path.join(_VENV, "bin", "python3")

if os.path.exists(_PYTHON) and os.path.realpath(sys.prefix) != os.path.realpath(_VENV):
    os.execv(_PYTHON, [_PYTHON, *sys.argv])
if not all(importlib.util.find_spec(name) for name in ("click", "isal", "xxhash", "zstandard")):
    sys.exit(f"blockdiff: the packages it needs are not installed here; `make -C {_ROOT} demo` sets them up")
sys.path.insert(0, _ROOT)
