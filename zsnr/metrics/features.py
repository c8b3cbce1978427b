"""Networks that extract features of images, and the resizing of their input."""

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
from zsnr.weights.source import digest

SIZE = 299
WEIGHTS = (
    "weights-inception-2015-12-05-6726825d.pth, from "
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
)
_BLOCKS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1"),
    *("Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b"),
    *("Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


def resize_clean(images: Tensor, size: int = SIZE) -> Tensor:
    """Resize for FID: bicubic with antialiasing, without rounding the result to 8 bits.

    Each channel is resized by Pillow in float32, on the CPU, because Parmar et al.
    (arXiv:2104.11222) found that only this avoids aliasing; values may slightly exceed 0 and 255.

    Args:
        images: (B, 3, H, W) uint8 levels.
        size: Height and width of the result.

    Returns:
        (B, 3, size, size) float32 levels.

    Raises:
        ValueError: The dtype or shape is wrong.
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

    `forward` maps levels (B, 3, 299, 299) in 0 .. 255, float32, to features (B, 2048) and logits
    (B, 1008), which are without bias as IS requires.

    Args:
        weights: torch-fidelity's file, or its tensors as .safetensors.

    Raises:
        ValueError: The file does not exist or holds something else, or torch-fidelity is not
            installed.
    """

    size = SIZE

    def __init__(self, weights: str) -> None:
        super().__init__()
        path = check_weights(weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # Its class unpickles any file, so it gets tensors that were read safely.
        safe = io.BytesIO()
        torch.save(_read_tensors(path), safe)
        safe.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], safe)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{weights} does not hold the weights of FID's Inception network: wanted {WEIGHTS}."
            ) from error
        self.fingerprint = f"inception {digest([path])}"

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        x = (levels - 128) / 128
        for name in _BLOCKS:
            x = getattr(self.network, name)(x)
        features = x.flatten(1)
        return features, features @ self.network.fc.weight.T


def check_weights(weights: str) -> Path:
    """Check that the file of Inception's weights exists, without opening it.

    Raises:
        ValueError: The file does not exist, or torch-fidelity is not installed.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"{weights}: no such file. FID's Inception weights are {WEIGHTS}.")
    if find_spec("torch_fidelity") is None:
        raise ValueError("Inception needs torch-fidelity: pip install 'zsnr[fid]'.")
    return path


class FeatureExtractor:
    """Extracts features, and logits if the network has them, from images.

    Args:
        network: An Inception, or any module from levels (B, 3, size, size) in 0 .. 255, float32, to
            features (B, D), or to features and logits (B, K). Its attribute `size` is the input
            size; default 299.
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
        """Extract features of uint8 images (B, 3, H, W) of any size.

        Raises:
            ValueError: The network's output has the wrong shape.
        """
        self.network.eval()
        tensors = [*self.network.parameters(), *self.network.buffers()]
        device = tensors[0].device if tensors else images.device
        output: Any = self.network(resize_clean(images, self.size).to(device))
        features, logits = output if isinstance(output, tuple) else (output, None)
        for rows in (features, logits):
            if rows is not None and (rows.ndim != 2 or len(rows) != len(images)):
                raise ValueError(
                    f"{class_path(self.network)} returned shape {tuple(rows.shape)} for "
                    f"{len(images)} images: wanted (B, D)."
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a plain file of weights (programs and TorchScript are not opened): "
            f"wanted {WEIGHTS}."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds more than weights: wanted {WEIGHTS}.")
    return content
