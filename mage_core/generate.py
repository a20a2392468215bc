"""Your own image, sentence and speed to a video: the one call of the README (Section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mage_core.clips import Dataset, check_speed, text_ids
from mage_core.files import check_place, expanded
from mage_core.machine import autocast, device_of
from mage_core.mage import MAGE
from mage_core.semantics import check_range
from mage_core.tokens import code_vectors
from mage_core.vqvae import VQVAE
from mage_core.weights import Trained, load

CLIPS_AT_ONCE = 50   # of a CPU's batch; a GPU takes five times as many


def generate(image, caption: str, speed: float, *, weights: str | Path | Trained, seed: int = 0, samples: int = 1,
             device: str | torch.device | None = None, save: str | Path | None = None) -> Tensor:
    """Make a video from one image, one sentence and a speed: (T c H W) in [0, 1], or (samples T c H W) for several.

    `image` is a path, a PIL image, uint8 (H W c) or (H W), or float (c H W) or (H W) in [0, 1], of the size that the
    weights were trained on; `weights` is a name (`mage_core.weights.names()`), a file or what `load` returned; `seed`
    seeds the randomness of a stochastic model, a deterministic one makes the same video every time, and all `samples`
    (at least 1) alike. With `save` the video (the first of several samples) is written, as GIF or MP4 by the name's
    ending. Raises ValueError, naming the value, the rule and the remedy, for an image of another size or kind, a
    sentence that does not parse (`CaptionError`), a speed outside the open interval (0, 1), weights that are not there,
    a seed or number of samples that is none, a device that is not there, or a file name of another ending or in a place
    that cannot be written; ImportError for MP4 without PyAV (the extra `video`).
    """
    speed = check_speed(speed)
    device = None if device is None else device_of(device)
    if not isinstance(seed, Integral) or not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed is {seed!r}: it must be a whole number from 0 to 2^63 - 1")
    if not isinstance(samples, Integral) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1, a whole number")
    if save is not None:
        from mage_core import display   # matplotlib and imageio are not needed to train and evaluate
        display.check_video_name(save)
    trained = weights if isinstance(weights, Trained) else load(weights)
    dataset = trained.dataset
    sentence = dataset.tidy(caption)
    first = read_image(image, dataset.image_size, dataset.channels)
    save = None if save is None else check_place(save)
    videos = generate_videos(trained.vqvae, trained.mage, dataset, first[None].expand(samples, -1, -1, -1),
                             [sentence] * samples, [speed] * samples, [int(seed) + i for i in range(samples)],
                             device=device)
    if save is not None:
        display.save_video(videos[0], save, scale=max(1, 256 // dataset.image_size))
    return videos[0] if samples == 1 else videos


@torch.no_grad()
def generate_videos(vqvae: VQVAE, mage: MAGE, dataset: Dataset | str, images: Tensor, sentences: Sequence[str],
                    speeds: Sequence[float], seeds: Sequence[int] | None = None, *,
                    device: str | torch.device | None = None, decode: str | None = None) -> Tensor:
    """A batch of images (b c H W), sentences, speeds and seeds to videos (b T c H W), all in [0, 1].

    `decode` is "mean", each token decoded as its mean code (see `MAGE.generate`), "argmax", as the released code does,
    or "still", which is "mean" where something changed: a token that is the first frame's shows the image's own pixels.
    The default is "still" for a VQ-VAE with a background, whose camera does not move, and else "mean" (on 48 clips that
    no table shows: CATER-GEN-v1 32.24 to 32.52 dB, v2 29.56 to 30.58). `dataset` (or its name) says how captions read.
    The first frame is the image itself; the others are decoded from tokens. ValueError for another `decode`, for a
    speed outside (0, 1), for images in another range and for different numbers of what is given.
    """
    device = torch.device(device) if device is not None else next(mage.parameters()).device
    speeds = [check_speed(speed) for speed in speeds]
    if not (len(images) == len(sentences) == len(speeds) > 0):
        raise ValueError(f"{len(images)} images, {len(sentences)} sentences and {len(speeds)} speeds: there must be as "
                         "many of each, and at least one")
    if not images.is_floating_point():
        raise ValueError(f"the images are {images.dtype}: they must be float in [0, 1]; divide by 255 where they are "
                         "8-bit")
    check_range(images, "images")
    images = images.float()
    decode = decode or ("still" if vqvae.config.background else "mean")
    if decode not in ("mean", "argmax", "still"):
        raise ValueError(f"decode is {decode!r}: it must be 'mean', 'argmax' or 'still'")
    at_once = CLIPS_AT_ONCE if device.type == "cpu" else 5 * CLIPS_AT_ONCE
    if len(images) > at_once:   # memory is bounded, whatever the number of videos
        seeds = range(len(images)) if seeds is None else seeds
        return torch.cat([generate_videos(vqvae, mage, dataset, images[part], sentences[part], speeds[part],
                                          seeds[part], device=device, decode=decode)
                          for part in (slice(i, i + at_once) for i in range(0, len(images), at_once))])
    vqvae, mage = vqvae.to(device).eval(), mage.to(device)
    noise = mage.noise(range(len(images)) if seeds is None else seeds) if mage.config.stochastic else None
    with autocast(device):   # as the training's tokens were made
        first = vqvae.encode(images.to(device))
        ids, codes = mage.generate(first, text_ids(sentences, dataset).to(device),
                                   torch.tensor(list(speeds), dtype=torch.float32, device=device), prior_noise=noise,
                                   codes=vqvae.codebook)
    if decode == "argmax":
        codes = code_vectors(ids, vqvae.codebook, vqvae.config.groups)
    parts = rearrange(codes, "b t h w e -> (b t) h w e").split(10 * CLIPS_AT_ONCE)   # the released decoder is wide
    frames = torch.cat([vqvae.decode_codes(part) for part in parts])
    videos = rearrange(frames, "(b t) c h w -> b t c h w", b=len(images)).cpu()
    if decode == "still":
        down = vqvae.config.down
        same = repeat(ids == ids[:, :1], "b t h w -> b t 1 (h y) (w x)", y=down, x=down).cpu()
        videos = torch.where(same, images[:, None].to(videos), videos)
    videos[:, 0] = images
    return videos


def read_image(image, size: int, channels: int) -> Tensor:
    """An image of any accepted kind as float (c H W) in [0, 1]; ValueError for another size, kind or range.

    A path or a PIL image of 8 bits a channel is converted to grey or RGB, what is transparent in it before black;
    arrays and tensors must have the right channels already.
    """
    if isinstance(image, (str, Path)):
        path = expanded(image)
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened.copy())   # as every viewer turns it
        except FileNotFoundError as error:
            raise ValueError(f"image {str(image)!r} is not a file: give the path of a PNG or JPEG") from error
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {str(image)!r} cannot be read as a picture: give a PNG or JPEG of {size} x {size} "
                             "pixels") from error
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":   # which Pillow would clip at 255
            raise ValueError(f"the image's mode is {image.mode!r}, more than 8 bits a pixel: scale it to 8 bits first, "
                             "e.g. 16 of them by Image.fromarray((np.asarray(image) // 257).astype('uint8'))")
        try:
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except ValueError as error:
            raise ValueError(f"the image's mode is {image.mode!r}, of which Pillow makes neither grey nor RGB: convert "
                             "it first, e.g. image.convert('RGBA')") from error
    try:
        array = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    except (TypeError, ValueError) as error:
        raise ValueError(f"image {str(image)[:40]!r} is a {type(image).__name__} that cannot be read as numbers "
                         f"({error}): give a path, a PIL image, uint8 (H W c) or float (c H W) in [0, 1]") from error
    if array.dtype == torch.uint8:
        array = array[..., None] if array.ndim == 2 else array
        array = array.permute(2, 0, 1).float() / 255 if array.ndim == 3 else array
    elif array.is_floating_point():
        array = array[None].float() if array.ndim == 2 else array.float()
        if array.numel() and not (array.isfinite().all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"image values go from {array.min():g} to {array.max():g}: float images are in [0, 1]; "
                             "divide by 255 where they are 8-bit")
    else:
        raise ValueError(f"image values are {array.dtype}: give uint8 (H W c) or float (c H W) in [0, 1]")
    if tuple(array.shape) != (channels, size, size):
        raise ValueError(f"the image is {' x '.join(map(str, array.shape))} (c H W): these weights take "
                         f"{channels} x {size} x {size}; resize and convert it, e.g. image.resize(({size}, {size}))")
    return array
