"""Count the launches of a forward pass of the fused neck without a GPU: `python -m bench.launches`.

A launch of one of this package's own kernels is counted when Triton's interpreter starts the kernel. All
other launches, such as matrix products, convolutions, elementwise operations and reductions, are counted in
torch's CPU profile. Views and allocations are not counted, because they launch nothing. The convolutions of
the gate are listed separately and are not part of the total. On a GPU, `bench.fused_neck` counts the launches
with the profiler.
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
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from srm_model import SRMConfig, SRMNeck

CONVOLUTIONS = {"mkldnn_convolution", "thnn_conv2d", "_slow_conv2d_forward"}
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "addmv", "mv", *CONVOLUTIONS}
NOTHING = {  # views, allocations and queries
    "alias", "as_strided", "chunk", "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unflatten", "unsafe_split", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "numpy_T", "mT",
    "item", "to", "_nnpack_available", "_local_scalar_dense", "is_nonzero", "resize_",
}  # fmt: skip
# Each of these operators is one kernel on a GPU, although it may call several operators on a CPU.
WHOLE = {"add", "div", "mean", "mul", "rsub", "sub", "sum", "_foreach_copy"}
OWN, GATE = "own kernel ", "gate"
WIDTHS, STRIDES = (3, 4, 5, 6), (4, 8, 16, 32)


class Launches(NamedTuple):
    """Number of launches of each kernel or operator in one call.

    Attributes:
        kernels: Launches of this package's own kernels.
        products: Launches of library kernels for matrix products and convolutions, except the convolutions of the
            gate.
        others: All other launches.
        gate: Launches of the convolutions of the gate.
    """

    kernels: Counter[str]
    products: Counter[str]
    others: Counter[str]
    gate: Counter[str]

    @property
    def total(self) -> int:
        """Return the number of launches without the convolutions of the gate."""
        return self.kernels.total() + self.products.total() + self.others.total()

    def __str__(self) -> str:
        names = ("own kernels", "library products", "others", "of the gate's convolutions, not counted")
        parts = []
        for name, counter in zip(names, self, strict=True):
            if counter:
                each = ", ".join(f"{count} {of}" for of, count in sorted(counter.items()))
                parts.append(f"{counter.total()} {name} ({each})")
        return f"{self.total} launches: " + "; ".join(parts)


@contextmanager
def _marked() -> Iterator[None]:
    """Record the name of every interpreted kernel in torch's profile."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        with record_function(OWN + self.fn.__name__.strip("_")):
            return plain(self, *args, **options)

    with mock.patch.object(InterpretedFunction, "run", run):
        yield


def count_launches(call: Callable[[], object], gate: torch.nn.Module | None = None) -> Launches:
    """Count the launches of one call.

    Args:
        call: Function to call. Its Triton kernels must run in Triton's interpreter, or as stubs in a block
            `with overhead.pretended():`.
        gate: Module whose convolutions are counted separately.
    """
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
    """Count the launches of an event of the profile; return whether anything was counted.

    Each kernel of this package, and each operator in `PRODUCTS` or `WHOLE`, counts as one launch. For any other event,
    the launches of the events inside it are counted. If the events inside it launch nothing, and the event is an
    operator of PyTorch that is not in `NOTHING`, the event itself counts as one launch.
    """
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


def forward_of(*, dyt: bool, side: int = 512, batch: int = 2) -> tuple[SRMNeck, list[Tensor]]:
    """Return a neck with the backend "triton", in evaluation mode, and its maps (B, C_i, h, w).

    Triton's interpreter is slow, so the maps have few channels and few rows. The number of launches does not
    depend on channels and rows. It depends on the links of the neck, on the widths w of the maps, and on
    whether a source has more than 512 keys.

    Args:
        dyt: Whether the neck has DyT.
        side: Image side in pixels. A map of a stage with stride s has the width w = side / s. Its height is w / 16, but
            at least 1.
        batch: Batch size B.
    """
    torch.manual_seed(0)
    neck = SRMNeck(
        WIDTHS,
        SRMConfig(channels=16, heads=1, rank=4, landmarks="leverage", pool_size=2, dyt=dyt, backend="triton"),
    ).eval()
    neck.median_rms.fill_(1.0)
    neck.check = lambda pyramid: None  # type: ignore[method-assign]  # synchronises on a CPU but not on a GPU
    maps = [
        torch.randn(batch, c, max(side // (16 * s), 1), side // s)
        for c, s in zip(WIDTHS, STRIDES, strict=True)
    ]
    return neck, maps


def main() -> None:
    """Print the number of launches of a forward pass, with and without DyT, each in fp32 and under autocast.

    The neck has the default links.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
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
