"""Benchmarks. README.md in this folder says what each benchmark measures. `results/` holds the committed results."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # must precede `import torch`; the profiler logs every start
