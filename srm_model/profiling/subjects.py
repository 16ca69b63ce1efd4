"""Cases to measure: a neck or a model, for images of one size.

A case is a forward pass, a forward and a backward pass, or a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from srm_kernels import landmark_solve
from srm_model.backbones import Backbone
from srm_model.config import STAGES, SRMConfig
from srm_model.model import IQAModel, build_model
from srm_model.neck import make_neck
from srm_model.profiling.counting import map_sizes
from srm_model.profiling.memory import bytes_of
from srm_model.training.optimisation import parameter_groups
from srm_model.training.seeding import seeded

PARTS = ("neck", "model")
DIRECTIONS = ("forward", "backward", "step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A neck on random maps, or a model on random images."""

    part: str  # "neck" or "model"
    backbone: str  # name of a timm model
    neck: str  # "srm", "quadratic" or "none"
    backend: str | None  # None selects the fastest backend
    resolution: int  # side of the square images, in pixels
    batch: int  # images per call
    dtype: str  # "fp32", or the dtype of autocast, "bf16" or "fp16"
    # "forward" (no gradients), "backward" (both passes), or "step" (both passes, gradient clipping and AdamW).
    direction: str

    @property
    def label(self) -> str:
        """Name of the neck and its backend, for tables."""
        return f"{self.neck} [{self.backend or 'default'}]" if self.neck == "srm" else self.neck

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Subject:
    """A case whose module and inputs are on a device. `call` runs the case once."""

    def __init__(self, case: Case, config: SRMConfig, device: torch.device) -> None:
        if min(case.resolution, case.batch) < 1:
            raise ValueError(
                f"resolution={case.resolution} and batch={case.batch}: expected at least 1 for both"
            )
        self.case, self.device = case, device
        self.config = config.replace(backend=case.backend, image_size=case.resolution)
        self.dtype = DTYPES[case.dtype]
        with seeded(0):
            self.module = make_module(case, self.config)
            # Training and scoring use channels_last too.
            self.module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.inputs = make_inputs(case, device, self.dtype)
            self._calibrate()
        pyramid = self.inputs[0] if case.part == "neck" else []
        for tensor in pyramid:
            tensor.requires_grad_(case.direction != "forward")
        self._leaves = [*self.module.parameters(), *pyramid]
        self.module.train(case.direction != "forward")
        self._optimizer: torch.optim.Optimizer | None = None
        if case.direction == "step":
            groups = parameter_groups(self.module, self.config)
            fused = device.type in ("cpu", "cuda")
            self._optimizer = torch.optim.AdamW(groups, betas=self.config.betas, fused=fused)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.call: Callable[[], object] = self._forward if case.direction == "forward" else self._train

    @property
    def held(self) -> int:
        """Bytes that stay allocated between calls: parameters, buffers, optimiser state and inputs."""
        state = [dict(values) for values in self._optimizer.state.values()] if self._optimizer else []
        return bytes_of(*self.module.parameters(), *self.module.buffers(), *state, self.inputs)

    @property
    def compulsory(self) -> int:
        """Lower bound of the bytes that a call must move to and from memory, even if all its operations are fused.

        For the direction "forward", the bound counts the inputs, the parameters and, for a neck, the result. The scores
        of a model are not counted. For "backward", the bound is twice as large, because it also counts the gradients of
        these tensors. The images of a model are counted twice too, although they have no gradient. For "step", the
        bound is that of "backward" plus seven times the size of the parameters, because the optimiser reads the
        gradient, the weight and two moments, and writes the weight and both moments.
        """
        weights = bytes_of(*self.module.parameters())
        result = self.case.batch * self.config.channels * self.config.pool_size**2 * self.dtype.itemsize
        through = bytes_of(self.inputs) + weights + (result if self.case.part == "neck" else 0)
        if self.case.direction == "forward":
            return through
        return 2 * through + (7 * weights if self.case.direction == "step" else 0)

    def solve(self) -> Callable[[], object] | None:
        """Return a function that solves the landmark systems of this case, or None if the neck is not "srm".

        The function is used to time the solver without the rest of the neck. For the direction "forward", it runs only
        the forward pass of the solver. For the directions "backward" and "step", it also runs the solver's backward
        pass.
        """
        if self.case.neck != "srm":
            return None
        systems = list(self._systems())
        trained = self.case.direction != "forward"

        def call() -> None:
            for logits, rhs in systems:
                solution = landmark_solve(
                    logits, rhs, ridge=self.config.ridge, solver=self.config.solver, backend=self.case.backend
                )
                if trained:
                    solution.x.sum().backward()

        return call

    def _systems(self) -> Any:
        """Yield a random landmark system for every link: logits of normalised random keys, and a right-hand side."""
        sizes = map_sizes(self.case.resolution, self.case.resolution)
        tokens = dict(zip(STAGES, (h * w for h, w in sizes), strict=True))
        make = torch.Generator(self.device).manual_seed(1)
        d, trained = self.config.head_dim, self.case.direction != "forward"
        for source, target in self.config.links:
            if target in self.config.fused_stages:
                rank = min(self.config.rank, tokens[source])
                shape = (self.case.batch, self.config.heads, rank, d)
                keys, rhs = (torch.randn(shape, generator=make, device=self.device) for _ in range(2))
                keys = F.normalize(keys, dim=-1) * d**0.5
                logits = keys @ keys.mT / d**0.5
                yield logits.requires_grad_(trained), rhs.requires_grad_(trained)

    def _forward(self) -> object:
        with torch.no_grad(), self._autocast():
            return self.module(*self.inputs)

    def _train(self) -> None:
        # Gradients are removed at the end, so that every call allocates them and its peak memory includes them.
        with self._autocast():
            if isinstance(self.module, IQAModel):
                scores, losses = self.module(*self.inputs, return_losses=True)
                loss = (scores.float() - 0.5).square().mean()
            else:
                output = self.module(*self.inputs)
                losses, loss = output.losses, output.fused.float().square().mean()
        for name in ("tau", "entropy", "balance"):
            loss = loss + getattr(self.config, f"weight_{name}") * losses[name]
        self._scaler.scale(loss).backward()
        if self._optimizer is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self.module.clamp_()  # type: ignore[operator]
        for tensor in self._leaves:
            tensor.grad = None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    @torch.no_grad()
    def _calibrate(self) -> None:
        # Without calibration, attention is almost uniform and the landmark systems are untypical.
        with self._autocast():
            self.module.calibrate(*self.inputs)  # type: ignore[operator]


def make_module(case: Case, config: SRMConfig) -> nn.Module:
    """Create the neck or the model of a case, on the CPU, in evaluation mode."""
    if case.part == "model":
        return build_model(case.backbone, neck=case.neck, config=config)
    channels = backbone_channels(case.backbone, case.resolution)
    return make_neck(case.neck, channels, config).eval()


def make_inputs(case: Case, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Create random fp32 images for a model, or random maps for a neck.

    The maps have the given dtype, and the shapes of the backbone's maps.
    """
    layout = torch.channels_last
    if case.part == "model":
        images = torch.rand(case.batch, 3, case.resolution, case.resolution)
        return (images.to(device, memory_format=layout),)
    channels = backbone_channels(case.backbone, case.resolution)
    sizes = map_sizes(case.resolution, case.resolution)
    shapes = [(case.batch, c, *size) for c, size in zip(channels, sizes, strict=True)]
    return ([torch.randn(shape).to(device, dtype, memory_format=layout) for shape in shapes],)


@cache
def backbone_channels(name: str, resolution: int) -> tuple[int, ...]:
    """Return the channels of a backbone's four maps."""
    return tuple(Backbone(name, image_size=resolution).channels)


def meta_copy(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Move a module (in place) and its inputs to the meta device, to count the module's operations there."""

    def moved(value: Any) -> Any:
        return [moved(v) for v in value] if isinstance(value, list) else value.detach().to("meta")

    return module.to("meta"), tuple(moved(value) for value in inputs)
