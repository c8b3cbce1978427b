"""CLIP score: how well images match their captions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class CLIPScore:
    """max(100 cos(image, caption), 0) of each image, by a CLIP model.

    Hessel et al., arXiv:2104.08718, with a weight of 100. Captions that are longer than the model
    reads are truncated, with one warning.

    Args:
        model: A folder of transformers with a CLIPModel, its tokenizer and image processor; or
            ARCHITECTURE:FILE of open_clip, such as ViT-B-32:clip.safetensors.

    Raises:
        ValueError: The model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        self.name = model
        self.network: Any
        self._warned = False
        folder = Path(model).expanduser()
        if folder.is_dir():
            self._images, self._texts, self._cut = self._load_transformers(str(folder))
        elif ":" in model:
            self._images, self._texts, self._cut = self._load_open_clip(*model.split(":", 1))
        else:
            raise ValueError(
                f"{model}: no such folder. Wanted a folder with a CLIPModel of transformers, such "
                "as openai/clip-vit-base-patch32 from https://huggingface.co, or "
                "ARCHITECTURE:FILE of open_clip."
            )
        self.network.eval().requires_grad_(False)

    def to(self, device: torch.device) -> CLIPScore:
        """Move to a device, in place, and return self."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """Score each image, (B,), float32."""
        if len(images) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(images)} images.")
        self._warn(captions)
        a, b = self._images(images).double(), self._texts(captions).double()
        return (100 * torch.cosine_similarity(a, b)).clamp(min=0).float()

    def _warn(self, captions: Sequence[str]) -> None:
        """Say once that captions are cut, and how many of the first ones."""
        cut = 0 if self._warned else sum(map(self._cut, captions))
        if cut:
            self._warned = True
            warnings.warn(
                f"{cut} of {len(captions)} captions are longer than {self.name} reads: their CLIP "
                "scores are those of their beginnings.",
                stacklevel=3,
            )

    def _load_transformers(self, folder: str) -> _Encoders:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        from zsnr.weights.pretrained import load_whole

        self.network = load_whole(CLIPModel, folder, None, label="a CLIPModel")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"{folder} lacks a tokenizer or image processor: {reason}") from error
        longest = self.network.config.text_config.max_position_embeddings

        def encode_images(images: Sequence[Image]) -> Tensor:
            pixels = processor([*images], return_tensors="pt")["pixel_values"]
            return _embedding(self.network.get_image_features(pixel_values=self._put(pixels)))

        def encode_texts(captions: Sequence[str]) -> Tensor:
            tokens = tokenizer(
                [*captions],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            ids, mask = self._put(tokens["input_ids"]), self._put(tokens["attention_mask"])
            return _embedding(self.network.get_text_features(input_ids=ids, attention_mask=mask))

        def is_cut(caption: str) -> bool:
            return bool(len(tokenizer(caption, verbose=False)["input_ids"]) > longest)

        return encode_images, encode_texts, is_cut

    def _load_open_clip(self, architecture: str, weights: str) -> _Encoders:
        import open_clip
        from safetensors import SafetensorError

        if architecture not in open_clip.list_models():
            raise ValueError(f"open_clip has no model {architecture!r}.")
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"{weights}: no such file with weights of {architecture}.")
        try:
            created = open_clip.create_model_and_transforms(
                architecture, pretrained=str(path), weights_only=True
            )
        except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"Cannot load {architecture} from {weights}: {reason}") from error
        self.network, _, prepare = created
        tokenize = open_clip.get_tokenizer(architecture)
        return (
            lambda images: self.network.encode_image(
                self._put(torch.stack([*map(prepare, images)]))
            ),
            lambda captions: self.network.encode_text(self._put(tokenize([*captions]))),
            lambda caption: (
                not torch.equal(
                    tokenize([caption])[0], tokenize([caption], tokenize.context_length + 1)[0, :-1]
                )
            ),
        )

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.network.parameters()).device)


_Encoders = tuple[
    Callable[[Sequence["Image"]], Tensor], Callable[[Sequence[str]], Tensor], Callable[[str], bool]
]


def _embedding(output: Any) -> Tensor:
    """Return the projected embedding, which newer versions of transformers wrap."""
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embedding
