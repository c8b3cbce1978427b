"""The tags under which a run is logged: one table, for the board's text and the documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence

TERMINAL = "train_by_timestep/terminal"

TAGS: dict[str, dict[str, str]] = {
    "Scalars": {
        "train/loss": "v loss of the global batch with the weights of model.loss, but not with "
        "learned ones. Near 1 at the start of training.",
        "train/grad_norm": "Norm of the gradient before it is clipped.",
        "train/learning_rate": "Learning rate of the optimizer.",
        "train/images_per_second": "Training images per second, summed over all devices, without "
        "the time of validation.",
        "train/data_wait": "Share of the time in which rank 0 waited for a batch.",
        "train/tflops": "TFLOP/s of the network on each device, forward and backward pass.",
        "train/mfu": "Model FLOPs utilization: those FLOP/s as a share of the GPU's dense peak in "
        "bfloat16.",
        "train/gpu_memory": "GiB of a GPU's memory that rank 0 has reserved, at most so far.",
        "train/skipped_steps": "Optimizer steps skipped so far because the loss or the gradient "
        "was not finite.",
        "train/cut_captions": "Captions so far that were longer than the text encoder reads. It "
        "is logged once there are any.",
        "train/terminal_exposures": "Training samples so far that drew the last timestep, T - 1.",
        TERMINAL: "Mean training loss at the last timestep, over its most recent exposures; "
        "model.terminal_window sets how many.",
        "train_by_timestep/t<first>_<last>": "Mean training loss of one quarter of the timesteps, "
        "since it was last logged.",
        "loss_by_source/<name>": "Mean training loss of one source of data.train, since it was "
        "last logged. It is logged where there are several.",
        "loss_by_bucket/<size>": "Mean training loss of one aspect-ratio bucket, width x height, "
        "since it was last logged. It is logged where there are several.",
        "loss_weight/t<timestep>": "Learned weight of the training loss at one timestep.",
        "val/loss": "Validation loss at fixed noise, with the averaged weights if there are any.",
        "val/loss_raw": "The same with the weights that are not averaged.",
        "val_by_timestep/t<timestep>": "Validation loss at one timestep, with the averaged weights "
        "if there are any.",
        "val_by_timestep_raw/t<timestep>": "The same with the weights that are not averaged.",
        "adaptation/t<timestep>": "Validation loss divided by that of the pretrained model, "
        "converted to the prediction type and schedule of the run. 1 = as good as the pretrained "
        "model.",
        "watch/warnings": "Warnings of model.watch at a validation.",
        "watch/loss_ratio": "Mean training loss since the last verdict, divided by that of "
        "predicting zero.",
        "watch/terminal_over_bound": "Validation loss at the last timestep, divided by its lower "
        "bound without prompts.",
        "watch/latent_std": "Standard deviation of the latents.",
        "watch/luma": "Mean luma of the preview images less that of the training images.",
        "watch/contrast": "Mean RMS contrast of the preview images less that of the training "
        "images.",
        "watch/saturation": "Mean saturation of the preview images less that of the training "
        "images.",
        "watch/luma_spread": "Standard deviation of the preview images' mean luma, divided by that "
        "of the training images.",
        "output_gradient_by_timestep/t<first>_<last>": "Norm of the gradient of a sample's loss "
        "with respect to the network's output, root mean square over one quarter of the "
        "timesteps: what each quarter sends back into the weights.",
        "luma_mean/previews": "Mean luma of the preview images, from -1 (black) to 1 (white).",
        "metrics/luma_mean": "Mean luma of the images generated for validation.",
        "metrics/luma_std": "Standard deviation of the images' mean luma.",
        "metrics/luma_contrast": "Mean RMS contrast of luma within an image.",
        "metrics/luma_p01": "Mean of the images' first percentile of luma.",
        "metrics/luma_p99": "Mean of the images' 99th percentile of luma.",
        "metrics/luma_w1": "1-Wasserstein distance of the images' mean luma to that of real "
        "images.",
        "metrics/fid": "Frechet Inception distance to real images.",
        "metrics/kid": "Kernel Inception distance to real images.",
        "metrics/kid_std": "Standard deviation of the kernel Inception distance over subsets.",
        "metrics/inception_score": "Inception score.",
        "metrics/inception_score_std": "Standard deviation of the Inception score over parts of "
        "the images.",
        "metrics/clip_score": "Mean CLIP score of image and caption: 100 times their cosine "
        "similarity, at least 0.",
        "luma_mean_by_group/<group>": "Mean luma of the images of one group of captions.",
        "luma_contrast_by_group/<group>": "Mean RMS contrast of the images of one group of "
        "captions.",
        "latent_mean_by_channel/c<channel>": "Mean of one channel of the generated latents.",
    },
    "Images": {
        "previews": "Preview images, with prompt and seed below each (zsnr.training.Previews).",
        "schedule": "Noise schedule of the run, with the timesteps that previews sample at.",
    },
    "Histograms": {
        "luma_of_images/data": "Mean luma of each training image that was measured.",
        "luma_of_images/previews": "Mean luma of each preview image.",
        "luma_of_pixels/data": "Luma of the pixels of those training images.",
        "luma_of_pixels/previews": "Luma of the pixels of the preview images.",
    },
    "Text": {
        "config": "Configuration of the run, without passwords and other secrets.",
        "data": "Constants of the training data, measured once at the start.",
        "tags": "This table.",
    },
}
"""What each dashboard of TensorBoard shows: {dashboard: {tag: description}}. A part of a tag in
angle brackets stands for any value."""


def description(dashboard: str, tag: str) -> str | None:
    """Return the description of a tag as it was logged; None if the table does not have it."""
    for name, words in TAGS[dashboard].items():
        pattern = "[^/]+".join(map(re.escape, re.split("<[a-z]+>", name)))
        if re.fullmatch(pattern, tag):
            return words
    return None


def tag_table() -> str:
    """Return the table of all tags as Markdown."""
    rows = [
        (dashboard, f"`{name}`", words)
        for dashboard, names in TAGS.items()
        for name, words in names.items()
    ]
    return markdown_table([("dashboard", "tag", "description"), *rows])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells without bars; the first row is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def at_timestep(t: int) -> str:
    """Return the end of a tag that is of one timestep, such as t0999."""
    return f"t{t:04d}"


def quarters(num_timesteps: int) -> list[str]:
    """Return the ends of the tags of the four quarters of the timesteps, such as t0000_0249."""
    T = num_timesteps
    return [f"t{q * T // 4:04d}_{(q + 1) * T // 4 - 1:04d}" for q in range(4)]
