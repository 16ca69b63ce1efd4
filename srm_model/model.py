"""From pixels to a quality score: backbone, neck and head (docs/METHOD.md §1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srm_kernels.checks import may_ask

from .backbones import Backbone, check_backbone, check_size
from .checkpoint import load_weights, read_card
from .config import STORED, SRMConfig
from .modules import check_like, evaluating
from .neck import NeckOutput, SRMNeck, make_neck
from .necks import check_neck
from .statistics import BatchStatistics

RANGE_TOLERANCE = 1e-2  # room for a finite-difference step at the edge of [0, 1]
VARIANCE_FLOOR = 1e-6
DEEPEST_STRIDE = 32


class Head(nn.Module):
    """3×3 convolution, mean and standard deviation over positions, two linear layers → one score.

    A plain average would see only the position-averaged attention. No normalisation (it would undo the gain cap)
    and no clamp on the score.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(channels // 2, 1)
        self.conv = nn.Conv2d(channels, half, 3, padding=1)
        self.hidden = nn.Linear(2 * half, half)
        self.score = nn.Linear(half, 1)
        self.activation = nn.GELU()
        nn.init.constant_(self.score.bias, 0.5)  # the middle of normalised MOS

    def forward(self, fused: Tensor) -> Tensor:
        """(B, C, P, P) → (B,)."""
        x = self.activation(self.conv(fused)).flatten(2)
        deviation = (x.var(-1, correction=0) + VARIANCE_FLOOR).sqrt()
        statistics = torch.cat([x.mean(-1), deviation], -1)
        return self.score(self.activation(self.hidden(statistics))).squeeze(-1)


class IQAModel(nn.Module):
    """A no-reference image quality model. Make one with `build_model`.

    Images go in as pixels in [0, 1]; normalisation is inside, so attacks live in pixel space.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, neck: str, config: SRMConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        check_neck(neck)
        self.backbone_name, self.neck_name, self.config = backbone, neck, config
        self.backbone = Backbone(backbone, pretrained=pretrained, image_size=config.image_size)
        channels = self.backbone.channels
        self.neck = make_neck(neck, channels, config)
        self.head = Head(config.channels)
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self._state_pixels()
        self.tensor_names = frozenset(self.state_dict())  # of a checkpoint

    def _state_pixels(self) -> None:
        """Put mean and deviation of the pixels into buffers that no checkpoint holds."""
        for buffer, values in ((self.mean, self.backbone.mean), (self.std, self.backbone.std)):
            buffer.copy_(torch.tensor(values, device="cpu").view(1, 3, 1, 1))

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> IQAModel:
        """As usual; what no checkpoint holds is filled, so that a checkpoint then completes the model."""
        super().to_empty(device=device, recurse=recurse)
        self._state_constants()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> IQAModel:
        """The same where a module around this one is given memory."""
        without_memory = self.mean.is_meta
        super()._apply(fn, recurse)
        if without_memory and not self.mean.is_meta:
            self._state_constants()
        return self

    def _state_constants(self) -> None:
        self._state_pixels()
        self.backbone.state_constants()

    @property
    def stochastic(self) -> bool:
        """Whether two evaluations of one image may differ; attacks then need EOT."""
        return self.neck.stochastic

    def forward(
        self, images: Tensor, *, return_losses: bool = False, statistics: BatchStatistics | None = None
    ) -> Any:
        """Scores (B,) of images (B, 3, H, W), floats in [0, 1]: normalised MOS, higher is better.

        With `return_losses`, (scores, losses): the unweighted scalars "tau", "entropy", "balance" of the neck.
        `statistics` are for a batch cut into micro-batches, as in `SRMNeck.forward`.
        On the CPU, images outside [0, 1] or not finite are a ValueError; elsewhere asking would wait for the device.
        """
        pyramid = self.pyramid(images)
        if images.requires_grad and isinstance(self.neck, SRMNeck):
            self.neck.warn_uncalibrated()  # an attack, whatever is around this model
        output = self.neck(pyramid, statistics=statistics)
        scores = self.head(output.fused)
        return (scores, output.losses) if return_losses else scores

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The backbone's four maps for images in [0, 1]."""
        _check_images(images, self.mean)
        return self.backbone((images - self.mean) / self.std)

    def neck_output(self, images: Tensor) -> NeckOutput:
        """Everything the neck returns for images in [0, 1]."""
        return self.neck(self.pyramid(images))

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """`SRMNeck.calibrate` on images in [0, 1]: once, on the first training batch."""
        self.neck.calibrate(self.pyramid(images))

    def clamp_(self) -> None:
        """Keep τ in its range; call after every optimiser step."""
        self.neck.clamp_()

    @torch.no_grad()
    def diagnose(self, images: Tensor) -> dict[str, Any]:
        """`SRMNeck.diagnose` on images in [0, 1], in evaluation mode; plain JSON values."""
        with evaluating(self):
            return self.neck.diagnose(self.pyramid(images))


def _check_images(images: Tensor, like: Tensor) -> None:
    """Images that the model of which `like` is a buffer can take."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}; expected a floating-point tensor")
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if min(images.shape[2:]) < DEEPEST_STRIDE:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; expected sides of at least {DEEPEST_STRIDE}, "
            "the stride of the deepest map"
        )
    check_like("images", images, like, promoted=True)
    if not torch.compiler.is_compiling() and may_ask(images):
        low, high = (float(v) for v in images.detach().aminmax())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(f"images range from {low:.4g} to {high:.4g}; expected finite values in [0, 1]")


def build_model(
    backbone: str,
    *,
    neck: str = "srm",
    pretrained: bool = False,
    weights: str | Path | None = None,
    config: SRMConfig | None = None,
) -> IQAModel:
    """A quality model on any timm backbone with maps at strides 4, 8, 16 and 32.

    neck: "srm", "quadratic" (exact attention, same schedule) or "none". pretrained: ImageNet weights of the
    backbone. weights: a checkpoint folder, loaded strictly, with no network; its backbone, neck and config must
    be those asked for, but for `backend`, and its config is used where none is given. The model comes in evaluation
    mode.
    Raises ValueError for unknown names, a backbone without those strides or that cannot take images of
    `config.image_size`, or a checkpoint that does not fit.
    """
    if config is not None and not isinstance(config, SRMConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected an SRMConfig or None")
    if weights is None:
        check_backbone(backbone)
        check_size(backbone, (config or SRMConfig()).image_size)
        return IQAModel(backbone, neck, config or SRMConfig(), pretrained=pretrained).eval()
    model, _ = load_model(weights, backend=STORED if config is None else config.backend)
    for name, wanted, found in (("backbone", backbone, model.backbone_name), ("neck", neck, model.neck_name)):
        if wanted != found:
            raise ValueError(f"{weights} holds a model with {name} {found!r}; {wanted!r} was asked for")
    if config is not None and config != model.config:
        differing = [key for key, value in config.to_dict().items() if model.config.to_dict()[key] != value]
        raise ValueError(f"{weights} was made with another config; these differ: {', '.join(differing)}")
    return model.eval()


def load_model(folder: str | Path, *, backend: str | None = STORED) -> tuple[IQAModel, dict[str, Any]]:
    """The model stored in a checkpoint folder, on the CPU and in evaluation mode, and its card.

    backend: as `SRMConfig.backend`, in place of the one that trained it, which "stored" keeps: weights fit them all.
    A folder that is not a checkpoint, or not a whole one, is a ValueError of one sentence.
    """
    document = read_card(folder)
    config = SRMConfig.from_dict(document["config"])
    if backend != STORED:
        config = config.replace(backend=backend)
    model = IQAModel(document["backbone"], document["neck"], config)
    load_weights(model, folder)
    return model.eval(), document["card"]
