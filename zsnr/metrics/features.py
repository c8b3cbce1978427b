"""Networks that turn pictures into features, and the resizing before them."""

from __future__ import annotations

import io
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zsnr.described import class_path
from zsnr.pretrained import digest

SIZE = 299
WEIGHTS = (
    "weights-inception-2015-12-05-6726825d.pth, of "
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
)
_BLOCKS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1"),
    *("Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b"),
    *("Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


def resize_clean(images: Tensor, size: int = SIZE) -> Tensor:
    """Resize as FID demands: bicubic with antialiasing, without rounding to 8 bits after.

    Each channel by Pillow in float32, on the CPU, as Parmar et al. (arXiv:2104.11222) found that
    only this leaves no aliasing; values may pass 0 and 255 a little.

    Args:
        images: (B, 3, H, W) uint8 levels.
        size: Height and width of the result.

    Returns:
        (B, 3, size, size) float32 levels.

    Raises:
        ValueError: Another dtype or shape.
    """
    from PIL import Image

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: wanted torch.uint8, "
            "(B, 3, H, W)."
        )
    channels = images.cpu().flatten(0, 1).numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))
        for channel in channels
    ]
    return torch.from_numpy(np.stack(resized)).view(-1, 3, size, size)


class Inception(nn.Module):
    """The Inception network of FID, KID and IS, from a file of weights.

    `forward` takes levels (B, 3, 299, 299) in 0 .. 255, float32, and returns features (B, 2048) and
    logits (B, 1008), those without the bias, as IS takes them.

    Args:
        weights: torch-fidelity's file, or its tensors as .safetensors.

    Raises:
        ValueError: There is none, it holds something else, or torch-fidelity is not installed.
    """

    size = SIZE

    def __init__(self, weights: str) -> None:
        super().__init__()
        path = check_weights(weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # Its class unpickles whatever it is given, so it is given tensors that were read safely.
        safe = io.BytesIO()
        torch.save(_read_tensors(path), safe)
        safe.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], safe)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{weights} holds other weights than FID's Inception network has: wanted {WEIGHTS}."
            ) from error
        self.fingerprint = f"inception {digest([path])}"

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        x = (levels - 128) / 128
        for name in _BLOCKS:
            x = getattr(self.network, name)(x)
        features = x.flatten(1)
        return features, features @ self.network.fc.weight.T


def check_weights(weights: str) -> Path:
    """Refuse a file of Inception's weights that is not there; opens none.

    Raises:
        ValueError: So it is, or torch-fidelity is not installed.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"{weights}: no such file. FID's Inception weights are {WEIGHTS}.")
    if find_spec("torch_fidelity") is None:
        raise ValueError("Inception needs torch-fidelity: pip install 'zsnr[fid]'.")
    return path


class FeatureExtractor:
    """Pictures to features, and logits where the network has some.

    Args:
        network: An Inception, or any module from levels (B, 3, size, size) in 0 .. 255, float32, to
            features (B, D), or to features and logits (B, K). Its attribute `size` says which; 299
            if it has none.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size = int(getattr(network, "size", SIZE))
        self.fingerprint: str = getattr(network, "fingerprint", None) or _fingerprint(network)

    def to(self, device: torch.device) -> FeatureExtractor:
        """Move to a device, in place, and return self."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take uint8 pictures (B, 3, H, W) of any size.

        Raises:
            ValueError: The network gives something else than features.
        """
        self.network.eval()
        tensors = [*self.network.parameters(), *self.network.buffers()]
        device = tensors[0].device if tensors else images.device
        found: Any = self.network(resize_clean(images, self.size).to(device))
        features, logits = found if isinstance(found, tuple) else (found, None)
        for rows in (features, logits):
            if rows is not None and (rows.ndim != 2 or len(rows) != len(images)):
                raise ValueError(
                    f"{class_path(self.network)} gave shape {tuple(rows.shape)} for {len(images)} "
                    "pictures: wanted (B, D)."
                )
        return features.float(), None if logits is None else logits.float()


def _fingerprint(network: nn.Module) -> str:
    import hashlib

    content = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"{class_path(network)} {content.hexdigest()}"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a plain file of weights (a program or a TorchScript is not opened): "
            f"wanted {WEIGHTS}."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds more than weights: wanted {WEIGHTS}.")
    return found
