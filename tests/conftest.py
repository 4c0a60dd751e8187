"""One arithmetic thread per test process (two run side by side), and a short hypothesis profile.

With PORTABLE=1 in the environment no process has what only Linux has (tests/portable).
"""

import importlib
import os
import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what runs behind it so, and
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start would inherit it

if os.environ.get("PORTABLE"):
    hiding = str(Path(__file__).parent / "portable")
    os.environ["PYTHONPATH"] = os.pathsep.join((hiding, os.environ.get("PYTHONPATH", "")))
    sys.path.insert(0, hiding)
    sys.modules.pop("sitecustomize", None)
    importlib.import_module("sitecustomize")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast",
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fast")
