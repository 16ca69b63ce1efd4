"""Measure cases, and yield one row of results for each case. A case that fails does not end the sweep."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from srm_kernels import backends, choice
from srm_kernels.checks import current_name
from srm_kernels.registration import running
from srm_model.config import SRMConfig
from srm_model.necks import NECKS
from srm_model.profiling import counting
from srm_model.profiling.ceilings import Ceilings, ceilings
from srm_model.profiling.machines import clocks, machine
from srm_model.profiling.memory import is_out_of_memory, peak
from srm_model.profiling.stages import stage_times
from srm_model.profiling.subjects import (
    DTYPES,
    Case,
    Subject,
    backbone_channels,
    make_inputs,
    make_module,
    meta_copy,
)
from srm_model.profiling.timing import Effort, measure_together
from srm_model.training.seeding import seeded


def cases(
    *,
    parts: Iterable[str] = ("neck",),
    backbones: Iterable[str] = ("pvt_v2_b2",),
    necks: Iterable[str] = tuple(NECKS),
    backend_names: Iterable[str | None] | None = None,
    resolutions: Iterable[int] = (512,),
    batches: Iterable[int] = (1,),
    dtypes: Iterable[str] = ("fp32",),
    directions: Iterable[str] = ("forward",),
) -> list[Case]:
    """Return all combinations of the arguments as cases.

    `backend_names` are the backends of the neck `srm`. By default, all available backends are used. A None among the
    names stands for the device's default backend.
    """
    available = (name for name, status in backends().items() if status.available)
    names = list(map(current_name, backend_names or available))
    with_backend = [
        (neck, backend)
        for neck in necks
        for backend in (names if NECKS[neck].attention == "nystrom" else [None])
    ]
    return [
        Case(part, backbone, neck, backend, resolution, batch, dtype, direction)
        for part, backbone, resolution, batch, dtype, direction, (neck, backend) in itertools.product(
            parts, backbones, resolutions, batches, dtypes, directions, with_backend
        )
    ]


@dataclass
class Sweep:
    """Measure cases on one device in one run.

    The counts of parameters and MACs are reused for later cases that differ only in backend, batch size or dtype. The
    ceilings, which are the copy bandwidth and the matrix-product throughput of the device, are measured again for each
    case. The row of a case contains the highest ceilings that have been measured so far for the dtype of the case.
    """

    device: torch.device
    config: SRMConfig = field(default_factory=SRMConfig)
    effort: Effort | None = None  # default: `Effort.for_device`
    small: bool = False  # whether to measure ceilings with small buffers

    def __post_init__(self) -> None:
        self.effort = self.effort or Effort.for_device(self.device)
        self.machine = machine(self.device)
        self._ceilings: dict[str, Ceilings] = {}
        self._counts: dict[Any, dict[str, int | None]] = {}

    def rows(
        self, wanted: Iterable[Case], *, also: Callable[[Subject], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for every case, in order. The row of a case that fails has an `error` and no measurements.

        After a case has been measured, `also` is called with the `Subject` of this case.
        """
        for case in wanted:
            yield self.row(case, also)

    def row(self, case: Case, also: Callable[[Subject], None] | None = None) -> dict[str, Any]:
        """Measure one case; return JSON values. Times are in milliseconds, memory is in bytes."""
        usual = SRMConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != usual[name]}
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        label = f"{case.label} ({settings})" if settings else case.label
        row: dict[str, Any] = {**case.to_dict(), "label": label, "settings": settings, "error": None}
        row["kernels"] = None
        row["when"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            row |= self._figures(case, also)
        except Exception as error:  # the next cases can still be measured
            row["error"] = describe(error)
        if row["error"] and self.device.type == "cuda":
            gc.collect()  # outside the handler, because the traceback keeps the case's tensors alive
            torch.cuda.empty_cache()
        row["config"] = changed
        row["machine"] = {**self.machine, "clocks": clocks(self.device)}
        return row

    def _figures(self, case: Case, also: Callable[[Subject], None] | None) -> dict[str, Any]:
        assert self.effort is not None
        counts = self._count(case)
        subject = Subject(case, self.config, self.device)
        solve = subject.solve()
        together = {"all": subject.call} | ({"solve": solve} if solve else {})
        times = measure_together(together, self.device, self.effort)
        del solve, together
        with running() as ran:  # records the timed call, without calibration and separate solves
            memory = peak(subject.call, self.device, held=subject.held)
        middle = times["all"].typical * 1e-3
        roof = self._roof(case.dtype)
        work = counts["work"]
        figures: dict[str, Any] = {
            "parameters": counts["parameters"],
            "macs": {name: counts[name] for name in ("formula", "fvcore", "torch")},
            "parts": counts["parts"],
            "milliseconds": times["all"].to_dict(),
            "typical": times["all"].typical,
            "solve_milliseconds": times["solve"].to_dict() if "solve" in times else None,
            "solve_share": times["solve"].typical / times["all"].typical if "solve" in times else None,
            "ceilings": roof._asdict(),
            "tf32": _tf32() if self.device.type == "cuda" else None,
            "compulsory_bytes": subject.compulsory,
            "bandwidth_share": subject.compulsory / middle / roof.bandwidth,
            "work_macs": work * case.batch if work is not None else None,
            "matrix_share": work * case.batch / middle / roof.matrix_rate if work is not None else None,
            "launches": launches(subject.call, self.device),
            "memory": memory._asdict(),
            "stages": None,
            "kernels": choice.ran(self.device, case.backend, ran) if case.neck == "srm" else None,
        }
        if case.direction == "forward":
            figures["stages"] = stage_times(subject.module, subject.call, self.device, self.effort)
        if also is not None:
            also(subject)
        return figures

    def _roof(self, dtype: str) -> Ceilings:
        """Measure the ceilings again, and return the highest values so far.

        A single measurement can be too low, because the machine may be busy.
        """
        found = ceilings(self.device, DTYPES[dtype], small=self.small)
        known = self._ceilings.get(dtype, found)
        self._ceilings[dtype] = Ceilings(*(max(pair) for pair in zip(found, known, strict=True)))
        return self._ceilings[dtype]

    def _count(self, case: Case) -> dict[str, Any]:
        """Count the parameters and MACs of a case. The counts do not depend on backend, batch size or dtype."""
        trained = case.direction != "forward"
        key = (case.part, case.backbone, case.neck, case.resolution, trained)
        if key not in self._counts:
            config = self.config.replace(backend="reference", image_size=case.resolution)
            one = Case(
                case.part, case.backbone, case.neck, "reference", case.resolution, 1, "fp32", "forward"
            )
            with seeded(0):
                module, inputs = make_module(one, config), make_inputs(one, "cpu", torch.float32)
            channels = backbone_channels(case.backbone, case.resolution)
            sizes = counting.map_sizes(case.resolution, case.resolution)
            parts = counting.neck_macs(config, case.neck, channels, sizes)
            found: dict[str, Any] = {"parameters": counting.parameters(module), "parts": parts}
            # There is no formula for backbones.
            found["formula"] = sum(parts.values()) if case.part == "neck" else None
            found["fvcore"] = counting.fvcore_macs(module, inputs)
            module, inputs = meta_copy(module, inputs)
            found["torch"] = found["work"] = counting.torch_macs(module, inputs)
            if trained:
                for tensor in inputs[0] if case.part == "neck" else ():
                    tensor.requires_grad_()
                found["work"] = counting.torch_macs(module.train(), inputs, backward=True)
            self._counts[key] = found
        return self._counts[key]


def _tf32() -> dict[str, bool]:
    """Return whether fp32 operations may use TF32. Ceilings for fp32 can be higher with TF32."""
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "convolution": torch.backends.cudnn.allow_tf32,
    }


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Use the profiler to count the kernels that a call launches; return None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    return len(kernels(profiled))


def kernels(profiled: Any) -> list[Any]:
    """Return the kernels in a profile. Copies, fills and user annotations are left out."""
    return [
        event
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation()
        and not event.name().startswith(("Memcpy", "Memset", "[memory]"))
    ]


def article_cases(**narrowed: Iterable[Any]) -> list[Case]:
    """Return the cases of the article's table 3 and of its training throughput.

    In table 3, a case is the forward pass of a neck for one image. For the training throughput, a case is a training
    step of a whole model on a batch of four images. In both, images have 512×512 pixels, and the dtype is bf16.
    `narrowed` contains arguments of `cases`; they replace these values, or the defaults of `cases`.
    """
    table: dict[str, Iterable[Any]] = {"parts": ["neck"], "batches": [1], "directions": ["forward"]}
    throughput: dict[str, Iterable[Any]] = {"parts": ["model"], "batches": [4], "directions": ["step"]}
    shared: dict[str, Iterable[Any]] = {"resolutions": [512], "dtypes": ["bf16"]}
    return [case for rows in (table, throughput) for case in cases(**{**shared, **rows, **narrowed})]


def describe(error: BaseException) -> str:
    """Convert an error to a one-line message for the row of the failed case."""
    words = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory: {words[:200]}"
    return words[:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {words[:300]}"
