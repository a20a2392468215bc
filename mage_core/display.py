"""Pictures of what a model makes: film strips, GIFs and MP4s, attention overlays, token maps, a player.

Figures come back as closed matplotlib figures: as the last line of a notebook cell they show once, and
`figure.savefig` keeps them. Images are `t c H W` in [0, 1] (or uint8), tensors or arrays.
"""

from __future__ import annotations

import argparse
import html
import io
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from mage_core.clips import check_speed
from mage_core.files import check_place, write_whole

TRUTH, GENERATED, ACCENT, QUIET = "#2b6cb0", "#c53030", "#c53030", "#8a8a8a"
STYLE = {
    "figure.dpi": 110, "savefig.bbox": "tight", "image.cmap": "gray", "font.size": 9, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "axes.labelcolor": "#404040",
    "lines.linewidth": 1.4, "legend.frameon": False,
}
FILM_GAP = 3  # white pixels between frames


def frames_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """A video (t c H W), float in [0, 1] or uint8, as 8-bit frames (t H W) if c is 1 and (t H W c) if c is 3.

    Values outside [0, 1] are clipped. Raises ValueError for another rank, another c, or values that are not
    finite.
    """
    frames = video.detach().cpu() if isinstance(video, Tensor) else torch.as_tensor(np.ascontiguousarray(video))
    if frames.ndim != 4 or frames.shape[1] not in (1, 3) or not len(frames):
        raise ValueError(f"a video of shape {tuple(frames.shape)}: it must be (t c H W) with c = 1 or 3; "
                         "pick one from a batch with videos[0]")
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise ValueError(f"a video of type {frames.dtype}: it must be float in [0, 1] or uint8")
        frames = frames.float()
        if not torch.isfinite(frames).all():
            raise ValueError("a video with values that are not finite: check what made it")
        frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    frames = rearrange(frames, "t c h w -> t h w c").numpy()
    return frames[..., 0] if frames.shape[-1] == 1 else frames


def _image_uint8(image: Tensor | np.ndarray) -> np.ndarray:
    """An image (c H W) as 8-bit pixels (H W) or (H W c)."""
    return frames_uint8(image[None])[0]


# ----------------------------------------------------------------------------------------------------------
# Files


def gif_bytes(video: Tensor | np.ndarray, fps: float = 5, scale: int = 1) -> bytes:
    """A video (t c H W) as an endless GIF; `scale` enlarges it by a whole factor. Grey survives exactly.

    Raises ValueError for fps outside [0.002, 50], which GIF's 16 bits of 1/100 s cannot show, for a video that takes
    longer than they can say of one that stands still, or scale below 1.
    """
    _check_fps(fps, 0.002, 50)
    if len(video) > 1 and len(video) * round(100 / fps) >= 2 ** 16:
        raise ValueError(f"fps is {fps!r}: {len(video)} frames would take {len(video) / fps:.0f} seconds, and a GIF "
                         "says no more than 655 of a picture that stands still; give more frames a second")
    frames = [Image.fromarray(frame) for frame in _enlarge(frames_uint8(video), scale)]
    if frames[0].mode == "RGB":  # one palette for all frames, undithered: what stands still does not flicker
        whole = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
        # median cut forgets what is small: a highlight of white became yellow
        palette = whole.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                   duration=10 * round(100 / fps), loop=0)
    return file.getvalue()


def mp4_bytes(video: Tensor | np.ndarray, fps: float = 5, scale: int = 1) -> bytes:
    """A video (t c H W) as an H.264 MP4; an odd side grows by one pixel, as H.264 asks for even ones.

    Raises ImportError where PyAV is missing, ValueError for fps outside [0.001, 1000] or scale below 1.
    """
    _check_fps(fps, 0.001, 1000)
    _need_pyav()
    import imageio.v3 as imageio

    frames = _enlarge(frames_uint8(video), scale)
    if frames.ndim == 3:
        frames = repeat(frames, "t h w -> t h w c", c=3)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return imageio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec="libx264", fps=float(fps))


def save_gif(video: Tensor | np.ndarray, path: str | Path, fps: float = 5, scale: int = 1) -> Path:
    """Write a video (t c H W) as a GIF, whole or not at all; returns the path. ValueError for another suffix."""
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"{str(path)!r} does not end in .gif: name it so, or let `save_video` go by the name")
    return _write(path, gif_bytes(video, fps, scale))


def save_video(video: Tensor | np.ndarray, path: str | Path, fps: float = 5, scale: int = 1) -> Path:
    """Write a video (t c H W) as GIF or MP4, by the path's suffix; returns the path.

    Raises ValueError for another suffix; ImportError for MP4 without PyAV (the `video` extra).
    """
    return _write(path, check_video_name(path)(video, fps, scale))


def check_video_name(path: str | Path) -> Callable[..., bytes]:
    """What writes a video of that name, `gif_bytes` or `mp4_bytes`: a check before anything is generated.

    Raises ValueError for another suffix, ImportError for MP4 without PyAV.
    """
    writers = {".gif": gif_bytes, ".mp4": mp4_bytes}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise ValueError(f"{str(path)!r} ends in {suffix!r}: the name must end in .gif or .mp4")
    if suffix == ".mp4":
        _need_pyav()
    return writers[suffix]


def _need_pyav() -> None:
    try:
        import av  # noqa: F401  imageio's plugin would only say that it cannot write the format
    except ImportError as error:
        raise ImportError("MP4 needs PyAV, the `video` extra of this project: `pip install av`; "
                          "or save a GIF by giving a name that ends in .gif") from error


def show_gif(video: Tensor | np.ndarray, fps: float = 5, scale: int = 3):
    """A video (t c H W) as an `IPython.display.Image`: the last line of a cell plays it."""
    from IPython.display import Image as Shown

    return Shown(data=gif_bytes(video, fps, scale), format="gif")


def _enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    if not (isinstance(scale, (int, float, np.number)) and np.isfinite(scale) and scale == int(scale) >= 1):
        raise ValueError(f"scale is {scale!r}: it must be a whole number of at least 1")
    return frames.repeat(int(scale), axis=1).repeat(int(scale), axis=2)


def _check_fps(fps: float, least: float, most: float) -> None:
    if not (isinstance(fps, (int, float, np.number)) and least <= fps <= most):
        raise ValueError(f"fps is {fps!r}: it must be a number of {least:g} to {most:g} frames a second")


def _write(path: str | Path, content: bytes) -> Path:
    path = check_place(path)
    write_whole(path, lambda temporary: Path(temporary).write_bytes(content))
    return path


# ----------------------------------------------------------------------------------------------------------
# Film strips (Fig. 4, 5, 7, 10, 12, 13)


def film_strip(videos: Mapping[str, Tensor | np.ndarray], *, title: str | None = None,
               every: int = 1) -> Figure:
    """One row a video, its given first image framed at the left, as in Fig. 5, 10 and 13.

    `videos` maps a row's text (a caption, "truth", "eta = 0.5", ...) to a video (t c H W); the first
    frame and every `every`-th later one are shown. Raises ValueError for no videos or frames of unequal size.
    """
    if not isinstance(videos, Mapping) or not videos:
        raise ValueError("no videos: give a mapping from a row's text to a video (t c H W)")
    if not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every is {every!r}: it must be a whole number of at least 1, for each later frame")
    rows = {text: frames_uint8(video) for text, video in videos.items()}
    if len({frames.shape[1:] for frames in rows.values()}) > 1:
        sizes = {text: frames.shape[1:] for text, frames in rows.items()}
        raise ValueError(f"frames of unequal size cannot share a strip: {sizes}")
    longest = max(len(frames) for frames in rows.values())
    shown = range(every, longest, every)
    height, width = next(iter(rows.values())).shape[1:3]
    left = [0] + [2 * FILM_GAP + column * (width + FILM_GAP) for column in range(1, len(shown) + 1)]
    total = left[-1] + width
    inches = 10.0
    row_inches = inches * height / total + 0.28
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(rows), 1, squeeze=False, layout="constrained",
                                    figsize=(inches, len(rows) * row_inches + (0.3 if title else 0)))
        for axis, (text, frames) in zip(axes[:, 0], rows.items()):
            strip = np.full((height, total, *frames.shape[3:]), 255, dtype=np.uint8)
            for start, index in zip(left, [0, *shown]):
                if index < len(frames):
                    strip[:, start:start + width] = frames[index]
            axis.imshow(strip, vmin=0, vmax=255)
            axis.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=ACCENT, linewidth=2,
                                     clip_on=False))
            axis.set_title(textwrap.fill(text, 130))
            axis.set_axis_off()
        for start, index in zip(left, [0, *shown]):
            axes[-1, 0].text(start + width / 2, height + 2, "input" if index == 0 else f"{index + 1}",
                             ha="center", va="top", color=QUIET, fontsize=7)
        if title:
            figure.suptitle(textwrap.fill(title, 120), x=0.01, ha="left", fontsize=10)
    return _closed(figure)


def comparison(truth: Tensor | np.ndarray,
               generated: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray], *,
               caption: str, speed: float) -> Figure:
    """Truth above generated above their absolute difference, under caption and speed (Fig. 5).

    `truth` is (t c H W); `generated` is the same, or a mapping from a name to such videos, each then a row of
    its own with its PSNR over frames 2 to t (the mean over frames, at most 50 dB each).
    """
    from mage_core.metrics import frame_psnr

    named = generated if isinstance(generated, Mapping) else {"generated": generated}
    true = _float(truth)
    rows: dict[str, Tensor | np.ndarray] = {"truth": truth}
    for name, video in named.items():
        made = _float(video)
        if made.shape != true.shape:
            raise ValueError(f"{name} has shape {tuple(made.shape)}, the truth {tuple(true.shape)}: "
                             "they must agree")
        rows[f"{name}: {frame_psnr(made[1:], true[1:]).mean():.1f} dB"] = made
        rows["difference" if len(named) == 1 else f"{name}: difference"] = (made - true).abs()
    return film_strip(rows, title=f"{caption}   η = {check_speed(speed):.2f}")


def _float(video: Tensor | np.ndarray) -> Tensor:
    video = torch.as_tensor(video).detach().cpu()
    if not (video.is_floating_point() or video.dtype == torch.uint8):
        raise ValueError(f"the video is {video.dtype}: give uint8, or float in [0, 1]")
    return video.float() / 255 if video.dtype == torch.uint8 else video.float()


def _closed(figure: Figure) -> Figure:
    """Out of pyplot's hands: a notebook shows the returned figure once, and no list of open figures grows."""
    plt.close(figure)
    return figure


# ----------------------------------------------------------------------------------------------------------
# What the model looks at, what the tokens do, how training went


def overlay_attention(image: Tensor | np.ndarray, weights: Tensor | np.ndarray,
                      words: str | Sequence[str]) -> Figure:
    """The given image, and for each word the image under its attention weights: darker is more (Fig. 11).

    `image` is (c H W); `weights` is (h w) with one word, or (n h w) with n words: the motion anchor's
    cross-attention at the first frame's token rows and columns, each map scaled by its own maximum.
    Raises ValueError where words and maps do not match, or a weight is negative or not finite.
    """
    words = [words] if isinstance(words, str) else list(words)
    maps = np.asarray(torch.as_tensor(weights).detach().cpu().float())
    maps = maps[None] if maps.ndim == 2 else maps
    if maps.ndim != 3 or len(maps) != len(words) or not maps.size:
        raise ValueError(f"weights of shape {tuple(torch.as_tensor(weights).shape)} for {len(words)} words: "
                         "they must be (h w) for one word or (n h w) for n")
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise ValueError(f"attention weights from {maps.min()} to {maps.max()}: they must be finite and not "
                         "negative")
    pixels = _image_uint8(image)
    # white digits on black become pale ink on paper, so that red shows on both
    under = 255 - 0.45 * pixels if pixels.ndim == 2 else pixels
    height, width = pixels.shape[:2]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 1 + len(words), squeeze=False, layout="constrained",
                                    figsize=(1.9 * (1 + len(words)), 2.2))
        for axis in axes[0]:
            axis.set_axis_off()
        axes[0, 0].imshow(pixels, vmin=0, vmax=255)
        axes[0, 0].set_title("input")
        for axis, word, map_ in zip(axes[0, 1:], words, maps):
            axis.imshow(under, vmin=0, vmax=255)
            axis.imshow(map_ / max(map_.max(), 1e-12), cmap="Reds", vmin=0, vmax=1, alpha=0.6,
                        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
            axis.set_title(word, color=ACCENT)
    return _closed(figure)


def token_map(token_ids: Tensor | np.ndarray) -> Figure:
    """Token ids (t h w) as colours, a frame a panel; tokens that the frame before had too are faded.

    Colours say only "same" or "different"; the commonest token is grey. Raises ValueError for another rank or
    ids that are not whole numbers.
    """
    ids = np.asarray(torch.as_tensor(token_ids).detach().cpu())
    if ids.ndim != 3 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"token ids of shape {ids.shape} and type {ids.dtype}: give whole numbers (t h w)")
    changed = np.concatenate([np.ones_like(ids[:1], dtype=bool), ids[1:] != ids[:-1]])
    names, numbers, counts = np.unique(ids, return_inverse=True, return_counts=True)   # ids can be huge
    ids, size = numbers.reshape(ids.shape), len(names)
    # hues by the golden ratio: ids that are close get colours that are far apart
    hues = (np.arange(size) * 0.61803398875) % 1.0
    values = 0.55 + 0.35 * ((np.arange(size) * 0.7548776662) % 1.0)
    colours = hsv_to_rgb(np.stack([hues, np.full(size, 0.65), values], axis=-1))
    colours[counts.argmax()] = 0.92
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(ids), squeeze=False, layout="constrained",
                                    figsize=(1.3 * len(ids), 1.6))
        for frame, (axis, row, mask) in enumerate(zip(axes[0], ids, changed)):
            axis.imshow(row, cmap=ListedColormap(colours), vmin=0, vmax=max(1, size - 1), interpolation="nearest",
                        alpha=np.where(mask, 1.0, 0.18))
            axis.set_title("frame 1" if frame == 0 else f"{frame + 1}: {mask.sum()} new", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    return _closed(figure)


def loss_curve(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str = "samples",
               y_label: str = "loss", smooth: int = 1, log: bool = False) -> Figure:
    """Curves by name, each (x values, y values); `smooth` averages that many neighbours over a faint line."""
    if not curves:
        raise ValueError("no curves: give a mapping from a name to (x values, y values)")
    if not isinstance(smooth, Integral) or smooth < 1:
        raise ValueError(f"smooth is {smooth!r}: it must be a whole number of at least 1 (which leaves all as it is)")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
        for name, (x, y) in curves.items():
            x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
            if x.shape != y.shape or x.ndim != 1:
                raise ValueError(f"curve {name!r} has {x.shape} x values and {y.shape} y values: "
                                 "they must be equal")
            if 1 < smooth <= len(y) // 3:  # a shorter curve has nothing to smooth
                colour = axis.plot(x, y, linewidth=0.6, alpha=0.25)[0].get_color()
                y = np.convolve(y, np.full(smooth, 1 / smooth), mode="valid")
                x = x[(smooth - 1) // 2:][:len(y)]  # each mean stands in the middle of what it averages
                axis.plot(x, y, color=colour, label=name)
            else:
                axis.plot(x, y, label=name)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if log:
            axis.set_yscale("log")
        if len(curves) > 1:
            axis.legend()
        else:
            axis.set_title(next(iter(curves)))
    return _closed(figure)


def motion_end_plot(speeds: Sequence[float], truth: Sequence[int], generated: Sequence[int]) -> Figure:
    """How many frames until the motion ends, over the speed: the truth a line, the model dots (Fig. 6).

    `truth` and `generated` come from `mage_core.semantics.frames_until_still`, one number a clip.
    """
    speeds, truth, generated = (np.asarray(values) for values in (speeds, truth, generated))
    if not len(speeds) == len(truth) == len(generated):
        raise ValueError(f"{len(speeds)} speeds, {len(truth)} and {len(generated)} frame counts: "
                         "they must be equal")
    order = np.argsort(speeds, kind="stable")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
        axis.plot(speeds[order], truth[order], color=TRUTH, linewidth=1, label="truth")
        axis.scatter(speeds, generated, color=GENERATED, s=6, label="generated", zorder=3)
        axis.set_xlabel("speed η")
        axis.set_ylabel("frames until still")
        axis.legend()
    return _closed(figure)


# ----------------------------------------------------------------------------------------------------------
# A panel to play with


LARGEST_SEED = 2 ** 31 - 1   # of an ipywidgets number


class Player:
    """A notebook panel: write or choose a caption, move the speed, and see the video that follows.

    Each change of caption, speed (once the slider is let go) or seed generates anew, and so does the button.
    `generate(image, caption, speed, seed) -> video (t c H W)` is any generator of this project or yours;
    `image` is (c H W) in [0, 1] or uint8. What it raises for bad input is shown in the panel, not as a
    traceback. The parts are `caption`, `examples`, `speed`, `seed`, `button`, `picture`, `message`; `video`
    is the last result.
    """

    def __init__(self, generate: Callable[[Tensor, str, float, int], Tensor], image: Tensor | np.ndarray,
                 captions: str | Sequence[str], *, speed: float = 0.5, seed: int = 0, fps: float = 5,
                 scale: int = 4):
        import ipywidgets as widgets

        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("no captions: give at least one sentence to start with")
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed is {seed}: the panel takes whole numbers from 0 to {LARGEST_SEED}")
        image = torch.as_tensor(image)
        image = image.float() / 255 if image.dtype == torch.uint8 else image   # (c H W) in both
        self.generate, self.image, self.fps, self.scale = generate, image, fps, scale
        self.video: Tensor | None = None
        wide = {"layout": widgets.Layout(width="640px"), "style": {"description_width": "70px"}}
        self.caption = widgets.Text(value=captions[0], description="caption", continuous_update=False, **wide)
        self.examples = widgets.Dropdown(options=captions, value=captions[0], description="examples", **wide)
        speed = check_speed(speed)
        self.speed = widgets.FloatSlider(value=speed, min=min(0.01, speed), max=max(0.99, speed), step=0.01,
                                         description="speed η", readout_format=".2f", continuous_update=False, **wide)
        self.seed = widgets.BoundedIntText(value=seed, min=0, max=LARGEST_SEED, description="seed",
                                           style={"description_width": "70px"})
        self.button = widgets.Button(description="generate", button_style="primary")
        self.message = widgets.HTML()
        size = {side: f"{scale * pixels}px" for side, pixels in zip(("height", "width"), image.shape[-2:])}
        self.picture = widgets.Image(value=gif_bytes(torch.as_tensor(image)[None], fps, scale), format="gif",
                                     layout=widgets.Layout(align_self="flex-start", **size))   # not the panel's width
        self.examples.observe(lambda change: setattr(self.caption, "value", change["new"]), names="value")
        for part in (self.caption, self.speed, self.seed):
            part.observe(lambda _: self.play(), names="value")
        self.button.on_click(lambda _: self.play())
        rows = [self.caption, self.speed, widgets.HBox([self.seed, self.button]), self.message, self.picture]
        if len(captions) > 1:
            rows.insert(0, self.examples)
        self.panel = widgets.VBox(rows)

    def play(self) -> None:
        """Generate with the values now in the panel; show the GIF, or why there is none."""
        self.button.disabled = True
        self._say("generating ...")
        start = time.perf_counter()
        try:
            video = self.generate(self.image, self.caption.value, self.speed.value, self.seed.value)
            gif = gif_bytes(video, self.fps, self.scale)
        except ValueError as error:  # a caption, a speed or an image that the visitor can mend
            self._say(str(error), wrong=True)
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}", wrong=True)
            raise
        else:
            self.video = video
            self.picture.value = gif
            self._say(f"{len(video)} frames in {time.perf_counter() - start:.2f} s")
        finally:
            self.button.disabled = False

    def _say(self, text: str, wrong: bool = False) -> None:
        # lines as they are, because an error of the grammar points at a word on the line above
        self.message.value = (f'<pre style="color: {GENERATED if wrong else QUIET}; white-space: pre; '
                              f'overflow-x: auto; line-height: 1.3">{html.escape(text)}</pre>')

    def _repr_mimebundle_(self, **kwargs):
        return self.panel._repr_mimebundle_(**kwargs)


def player(generate: Callable[[Tensor, str, float, int], Tensor], image: Tensor | np.ndarray,
           captions: str | Sequence[str], **options) -> Player:
    """A `Player` for one image: text box, speed, seed, button and GIF; the options are the class's own."""
    return Player(generate, image, captions, **options)


# ----------------------------------------------------------------------------------------------------------
# The README's pictures: python -m mage_core.display


def readme_pictures(folder: str | Path) -> list[Path]:
    """Draw every picture of the README again, into `folder`: each world, and what each model that ships makes of it.

    `<dataset>.gif` is the test sample 0 as its simulator draws it; `mage-<dataset>.gif` shows, of the test samples 0
    to 3, the truth (above) and what the shipped weights make of first image, sentence and speed (below).
    """
    from mage_core import cater, metrics, moving_mnist, weights
    from mage_core.clips import load_dataset
    from mage_core.generate import generate_videos

    folder, paths = Path(folder), []
    for name in (*moving_mnist.DATASETS, *cater.DATASETS):
        dataset = load_dataset(name)
        grey = dataset.channels == 1
        video = metrics.to_video(dataset.video(dataset.spec("test", 0))[None])[0]
        paths.append(save_gif(video if grey else video[::2], folder / f"{name}.gif", fps=8, scale=3 if grey else 1))
        if name in weights.names():
            trained = weights.load(name)
            batch = metrics.evaluation_batch(dataset, "test", range(4))
            made = generate_videos(trained.vqvae, trained.mage, name, batch.images, batch.captions, batch.speeds)
            both = rearrange([batch.truth, made], "two b t c h w -> t c (two h) (b w)")
            paths.append(save_gif(both, folder / f"mage-{name}.gif", fps=5, scale=2 if grey else 1))
    return paths


def main(arguments: list[str] | None = None) -> None:
    from mage_core.files import data_folder

    about = "Draw the README's pictures again."
    argparse.ArgumentParser(prog="python -m mage_core.display", description=about).parse_args(arguments)
    for path in readme_pictures(data_folder() / "pictures"):
        print(path.name)


if __name__ == "__main__":
    main()
