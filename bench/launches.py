"""What a forward pass of the fused neck launches, counted without a GPU: `python -m bench.launches`.

Our own kernels are counted where Triton's interpreter starts them, a launch each. Everything else is what torch's
profiler sees on the CPU: library products and convolutions, and what is neither, elementwise operations and reductions
among them; views and allocations launch nothing. On a GPU the profiler counts the same in `bench.fused_neck`. The
gate's convolutions are counted apart.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from srm_model import SRMConfig, SRMNeck

CONVOLUTIONS = {"mkldnn_convolution", "thnn_conv2d", "_slow_conv2d_forward"}
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "addmv", "mv", *CONVOLUTIONS}
NOTHING = {  # views, allocations and questions
    "alias", "as_strided", "chunk", "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unflatten", "unsafe_split", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "numpy_T", "mT",
    "item", "to", "_nnpack_available", "_local_scalar_dense", "is_nonzero", "resize_",
}  # fmt: skip
WHOLE = {
    "add",
    "div",
    "mean",
    "mul",
    "rsub",
    "sub",
    "sum",
    "_foreach_copy",
}  # one kernel each on a GPU, whatever they call on a CPU
OWN, GATE = "own kernel ", "gate"


class Launches(NamedTuple):
    """Of one call, by name: our own kernels, library products, all else, and the gate's convolutions."""

    kernels: Counter[str]
    products: Counter[str]
    others: Counter[str]
    gate: Counter[str]

    @property
    def total(self) -> int:
        """All but the gate's convolutions."""
        return self.kernels.total() + self.products.total() + self.others.total()

    def __str__(self) -> str:
        parts = (
            f"{counter.total()} {name} ({', '.join(f'{count} {of}' for of, count in sorted(counter.items()))})"
            for name, counter in (
                ("own kernels", self.kernels), ("library products", self.products), ("others", self.others),
                ("of the gate's convolutions, not counted", self.gate),
            )
            if counter
        )  # fmt: skip
        return f"{self.total} launches: " + "; ".join(parts)


@contextmanager
def _marked() -> Iterator[None]:
    """Every start of an interpreted kernel carries its name in the profile."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        with record_function(OWN + self.fn.__name__.strip("_")):
            return plain(self, *args, **options)

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = plain


def count_launches(call: Callable[[], object], gate: torch.nn.Module | None = None) -> Launches:
    """What one call launches, Triton being interpreted; `gate` is a module whose convolutions are counted apart."""
    hooks = []
    if gate is not None:
        range_ = record_function(GATE)
        hooks = [
            gate.register_forward_pre_hook(lambda *_: range_.__enter__() and None),
            gate.register_forward_hook(lambda *_: range_.__exit__(None, None, None)),
        ]
    with _marked(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    for hook in hooks:
        hook.remove()
    found = Launches(Counter(), Counter(), Counter(), Counter())
    for event in profiled.events():
        if event.cpu_parent is None:
            _add(event, found, event.name == GATE)
    return found


def _add(event: Any, found: Launches, gate: bool) -> bool:
    """Count an event or, where others inside it launch something, those; whether anything was counted."""
    name = event.name
    if name.startswith(OWN):
        found.kernels[name.removeprefix(OWN)] += 1
        return True
    gate = gate or name == GATE
    plain = name.removeprefix("aten::").rstrip("_")
    if plain in PRODUCTS:
        (found.gate if gate and plain in CONVOLUTIONS else found.products)[plain] += 1
        return True
    if plain in WHOLE:
        found.others[plain] += 1
        return True
    inside = [_add(child, found, gate) for child in event.cpu_children]
    if any(inside):
        return True
    if not name.startswith("aten::") or plain in NOTHING:
        return False
    found.others[plain] += 1
    return True


def forward_of(
    *,
    dyt: bool,
    side: int = 512,
    batch: int = 2,
    channels: int = 16,
    heads: int = 1,
    rank: int = 4,
    size: int = 2,
    **options: Any,
) -> tuple[SRMNeck, list[Tensor]]:
    """A neck of kernels in evaluation mode and some images' maps, as wide as those of pictures of `side` pixels.

    Few channels and rows, for the interpreter's sake: the number of launches depends on the schedule and the maps'
    widths alone, and on the keys that a source has, up to 1,024 of which take one launch.
    """
    torch.manual_seed(0)
    config = SRMConfig(
        channels=channels, heads=heads, rank=rank, pool_size=size, dyt=dyt, backend="triton", **options
    )
    neck = SRMNeck((3, 4, 5, 6), config).eval()
    neck.median_rms.fill_(1.0)
    neck.check = lambda pyramid: None  # type: ignore[method-assign]  # asks on a CPU what it asks of no GPU
    maps = [
        torch.randn(batch, c, max(side // (16 * s), 1), side // s)
        for c, s in zip((3, 4, 5, 6), (4, 8, 16, 32), strict=True)
    ]
    return neck, maps


def main() -> None:
    """A line for the default schedule with DyT and one without, then the same under autocast."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # asked before Triton is imported
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        raise SystemExit(subprocess.call([sys.executable, "-m", "bench.launches"], env=environment))
    for dtype, dyt in itertools.product((None, torch.float16), (True, False)):
        neck, maps = forward_of(dyt=dyt)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            found = count_launches(lambda neck=neck, maps=maps: neck(maps), neck.gate)
        precision = "" if dtype is None else ", autocast over fp32 maps and weights"
        print(f"512², evaluation, DyT {'on' if dyt else 'off'}{precision}: {found}")


if __name__ == "__main__":
    main()
