"""Files that other programs can read, figures that show what they say, and the panel without a browser."""

from __future__ import annotations

import io
import math
import re
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageSequence

matplotlib.use("Agg")

from mage_core import cater, display, moving_mnist, weights  # noqa: E402  after the backend is chosen
from mage_core.captions import parse  # noqa: E402
from mage_core.files import data_folder  # noqa: E402
from mage_core.moving_mnist import MovingMNIST  # noqa: E402


def video(frames: int = 6, channels: int = 1, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, channels, size, size, generator=torch.Generator().manual_seed(seed))


def pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def gif_frames(content: bytes) -> list[tuple[np.ndarray, int]]:
    with Image.open(io.BytesIO(content)) as file:
        return [(np.asarray(frame.convert("RGB")), frame.info["duration"])
                for frame in ImageSequence.Iterator(file)]


# ---------------------------------------------------------------------------------------------------- files


def test_frames_become_8_bit():
    assert (display.frames_uint8(torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.2]).view(5, 1, 1, 1)).ravel()
            == [0, 0, 128, 255, 255]).all()
    assert display.frames_uint8(video(channels=3)).shape == (6, 16, 16, 3)
    bytes_ = (video() * 255).to(torch.uint8)
    assert (display.frames_uint8(bytes_) == bytes_[:, 0].numpy()).all()
    assert (display.frames_uint8(video().numpy()) == display.frames_uint8(video())).all()


@pytest.mark.parametrize("wrong, word", [
    (torch.zeros(1, 6, 1, 16, 16), r"videos\[0\]"), (torch.zeros(6, 2, 16, 16), "c = 1 or 3"),
    (torch.zeros(0, 1, 16, 16), "t c H W"), (torch.zeros(6, 1, 16, 16, dtype=torch.int64), "float in"),
    (torch.full((6, 1, 16, 16), float("inf")), "finite"),
])
def test_bad_videos_are_named(wrong, word):
    with pytest.raises(ValueError, match=word):
        display.gif_bytes(wrong)


def test_a_grey_gif_keeps_every_value_and_its_time(tmp_path):
    path = display.save_gif(video(), tmp_path / "new" / "clip.gif", fps=4, scale=2)
    found = gif_frames(path.read_bytes())
    expected = display.frames_uint8(video()).repeat(2, axis=1).repeat(2, axis=2)
    assert len(found) == 6
    for (frame, duration), right in zip(found, expected):
        assert duration == 250
        assert (frame == right[..., None]).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.gif"]


def test_a_gif_that_stands_still_lasts_as_long():
    still = video(1).expand(8, 1, 16, 16)
    found = gif_frames(display.gif_bytes(torch.cat([still, 1 - still[:1]]), fps=5))
    assert sum(duration for _, duration in found) == 9 * 200


def test_a_colour_gif_is_near_and_does_not_flicker():
    row, column = torch.linspace(0, 1, 48).view(48, 1), torch.linspace(0, 1, 48).view(1, 48)
    still = torch.stack([row * column, row + 0 * column, 1 - column + 0 * row])  # more than 256 colours
    colours = still.expand(4, 3, 48, 48).clone()
    for frame in range(4):  # what moves brings other colours into every frame
        colours[frame, :, :12, 12 * frame:12 * frame + 12] = video(1, 3, 12, seed=frame)[0]
    found = np.stack([frame for frame, _ in gif_frames(display.gif_bytes(colours))])
    assert np.abs(found.astype(int) - display.frames_uint8(colours)).mean() < 12
    assert (found[:, 12:] == found[0, 12:]).all()


def test_an_mp4_plays_elsewhere(tmp_path):
    pytest.importorskip("av", reason="MP4 is the video extra")
    import imageio.v3 as imageio

    smooth = torch.nn.functional.interpolate(video(6, 3, 4), (63, 50), mode="bilinear")
    path = display.save_video(smooth, tmp_path / "clip.mp4", fps=np.float32(8))
    found = imageio.imread(path, plugin="pyav")
    assert found.shape == (6, 64, 50, 3)  # H.264 wants even sides
    assert np.abs(found[:, :63].astype(int) - display.frames_uint8(smooth)).mean() < 6
    assert imageio.immeta(path, plugin="pyav")["fps"] == 8
    grey = imageio.imread(display.save_video(video(), tmp_path / "grey.mp4"), plugin="pyav")
    assert grey.shape == (6, 16, 16, 3)


def test_a_video_played_backwards_is_saved():
    assert display.gif_bytes(video().numpy()[::-1]) == display.gif_bytes(video().flip(0))


def test_the_suffix_chooses_and_mistakes_are_named(tmp_path, monkeypatch):
    assert display.save_video(video(), tmp_path / "A.GIF").read_bytes()[:3] == b"GIF"
    with pytest.raises(ValueError, match=r"'\.avi'.*\.gif or \.mp4"):
        display.save_video(video(), tmp_path / "clip.avi")
    for options in ({"fps": 0}, {"fps": 0.001}, {"fps": 80}, {"scale": 0}, {"scale": 1.5}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            display.save_video(video(), tmp_path / "clip.gif", **options)
    for options in ({"fps": math.inf}, {"fps": 1e-9}, {"fps": None}, {"fps": "5"}, {"scale": math.nan},
                    {"scale": math.inf}, {"scale": None}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            display.mp4_bytes(video(), **options)
    for name in ("o.mp4", "o", "."):
        with pytest.raises(ValueError, match="end in .gif"):
            display.save_gif(video(), tmp_path / name)
    (folder := tmp_path.with_suffix(".gif")).mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        display.save_gif(video(), folder)
    assert len(gif_frames(display.gif_bytes(torch.zeros(2, 1, 4, 4), 0.01))) in (1, 2)
    with pytest.raises(ValueError, match="10 frames would take 1000 seconds.*655"):
        display.gif_bytes(torch.zeros(10, 1, 4, 4), 0.01)
    monkeypatch.setitem(sys.modules, "av", None)  # as where PyAV is not installed
    for fails in (lambda path: display.save_video(video(), path), display.check_video_name):
        with pytest.raises(ImportError, match="pip install av"):
            fails(tmp_path / "clip.mp4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["A.GIF"]


def test_a_notebook_gets_the_gif():
    shown = display.show_gif(video(), fps=5, scale=2)
    assert shown._repr_mimebundle_()[0]["image/gif"] if hasattr(shown, "_repr_mimebundle_") else shown.data
    assert shown.data == display.gif_bytes(video(), fps=5, scale=2)


# -------------------------------------------------------------------------------------------------- figures


def test_a_film_strip_frames_the_input_and_shows_every_frame():
    rows = {"truth": video(5, seed=1), "the digit 7 is moving up then down .": video(4, seed=2)}
    figure = display.film_strip(rows, title="η = 0.5")
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(rows)
    for axis, frames in zip(figure.axes, rows.values()):
        strip = np.asarray(axis.images[0].get_array())
        expected = display.frames_uint8(frames)
        starts = [0] + [16 + 3 * display.FILM_GAP + k * (16 + display.FILM_GAP) for k in range(4)]
        for start, frame in zip(starts, expected):
            assert (strip[:, start:start + 16] == frame).all()
        (frame,) = axis.patches
        assert (frame.get_width(), frame.get_height()) == (16, 16)
        assert matplotlib.colors.to_hex(frame.get_edgecolor()) == display.ACCENT
    assert [text.get_text() for text in figure.axes[-1].texts] == ["input", "2", "3", "4", "5"]
    assert pixels(figure).std() > 0
    assert not matplotlib.pyplot.get_fignums()


def test_a_film_strip_can_leave_frames_out():
    figure = display.film_strip({"": video(10, 3)}, every=3)
    assert [text.get_text() for text in figure.axes[-1].texts] == ["input", "4", "7", "10"]


def test_bad_strips_are_named():
    with pytest.raises(ValueError, match="no videos"):
        display.film_strip({})
    with pytest.raises(ValueError, match="unequal"):
        display.film_strip({"a": video(), "b": video(size=8)})
    with pytest.raises(ValueError, match="must agree"):
        display.comparison(video(5), video(6), caption="", speed=0.5)
    with pytest.raises(ValueError, match="open interval"):
        display.comparison(video(5), video(5), caption="", speed=1.0)


def test_a_comparison_tells_the_psnr_and_shows_the_difference():
    truth = torch.full((3, 1, 16, 16), 0.5)
    made = truth - 0.1
    figure = display.comparison(truth, made, caption="the digit 7 ...", speed=0.25)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["truth", "generated: 20.0 dB", "difference"]
    assert "η = 0.25" in figure.get_suptitle()
    assert np.asarray(figure.axes[2].images[0].get_array())[0, 0] in (25, 26)  # 0.1 of 255
    two = display.comparison(truth, {"a": made, "b": truth}, caption="", speed=0.5)
    assert [axis.get_title(loc="left") for axis in two.axes] == [
        "truth", "a: 20.0 dB", "a: difference", "b: 50.0 dB", "b: difference"]


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_is_reddest_where_the_weight_is(channels):
    image = torch.zeros(channels, 64, 64) if channels == 1 else torch.ones(channels, 64, 64)
    weights = torch.zeros(2, 16, 16)
    weights[0, 4, 12] = 0.3
    weights[1, 12, 4] = 0.001  # each map has its own scale
    figure = display.overlay_attention(image, weights, ["digit 7", "up"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["input", "digit 7", "up"]
    drawn = pixels(figure).astype(int)
    height = len(drawn)
    for axis, (row, column) in zip(figure.axes[1:], ((4, 12), (12, 4))):
        def redness(y, x):
            at = axis.transData.transform((4 * x + 1.5, 4 * y + 1.5)).astype(int)
            red, _, blue, _ = drawn[height - 1 - at[1], at[0]]
            return red - blue

        assert redness(row, column) > redness(column, row) + 30


@pytest.mark.parametrize("weights, words", [
    (torch.zeros(2, 4, 4), "one"), (torch.zeros(4, 4), ["one", "two"]), (torch.full((4, 4), -1.0), "one"),
    (torch.full((4, 4), float("nan")), "one"),
])
def test_bad_attention_is_named(weights, words):
    with pytest.raises(ValueError, match="weights"):
        display.overlay_attention(torch.zeros(1, 8, 8), weights, words)


def test_a_token_map_fades_what_did_not_change():
    ids = torch.zeros(3, 4, 4, dtype=torch.int64)
    ids[1:, 1, 2] = 2 ** 40   # as an id of several codes can be
    figure = display.token_map(ids)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["frame 1", "2: 1 new", "3: 0 new"]
    alpha = np.asarray(figure.axes[1].images[0].get_alpha())
    assert alpha[1, 2] == 1.0 and (np.delete(alpha.ravel(), 6) < 0.5).all()
    colours = figure.axes[0].images[0].get_cmap().colors
    assert len({tuple(colour) for colour in colours}) == 2 and len(set(colours[0])) == 1
    pixels(figure)
    with pytest.raises(ValueError, match="whole numbers"):
        display.token_map(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="give whole numbers"):
        display.token_map(torch.zeros(0, 4, 4, dtype=torch.long))


def test_whole_numbers_that_are_no_pixels_and_steps_that_are_no_frames_are_refused():
    with pytest.raises(ValueError, match="the video is torch.int64: give uint8, or float"):
        display.comparison((video() * 255).long(), video(), caption="", speed=0.5)
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"every is {every}: it must be a whole number"):
            display.film_strip({"a": video()}, every=every)
    with pytest.raises(ValueError, match="no videos: give a mapping"):
        display.film_strip(video())


def test_loss_curves_are_smoothed_in_the_middle():
    curves = {"train": (range(9), np.arange(9.0)), "test": ([0, 8], [5, 5])}
    figure = display.loss_curve(curves, smooth=3, log=True)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train", "test"]
    raw, smooth, short = axis.lines
    assert raw.get_ydata().tolist() == list(range(9)) and short.get_ydata().tolist() == [5, 5]
    np.testing.assert_allclose(smooth.get_xdata(), np.arange(1, 8))
    np.testing.assert_allclose(smooth.get_ydata(), np.arange(1, 8))
    with pytest.raises(ValueError, match="'train'"):
        display.loss_curve({"train": (range(9), range(8))})
    for smooth in (0, 1.5):
        with pytest.raises(ValueError, match=f"smooth is {smooth}: it must be a whole number"):
            display.loss_curve(curves, smooth=smooth)


def test_the_end_of_motion_is_a_line_and_dots():
    figure = display.motion_end_plot([0.9, 0.1], [5, 9], [6, 9])
    axis = figure.axes[0]
    assert axis.lines[0].get_xdata().tolist() == [0.1, 0.9]
    assert axis.lines[0].get_ydata().tolist() == [9, 5]
    assert axis.collections[0].get_offsets().tolist() == [[0.9, 6.0], [0.1, 9.0]]


# ---------------------------------------------------------------------------------------------------- panel


@pytest.fixture
def player():
    dataset = MovingMNIST("single-mnist")
    calls = []

    def generate(image, caption, speed, seed):
        parse(caption, dataset.name)
        calls.append((caption, speed, seed))
        return image[None].expand(10, 1, 64, 64) * speed

    image = torch.from_numpy(dataset.video(dataset.spec("test", 0))[0])[None] / 255
    panel = display.player(generate, image, ["the digit 7 is moving up then down .",
                                             "the digit 7 is moving left then right ."])
    return panel, calls


def test_the_panel_generates_what_its_parts_say_at_every_change_and_click(player):
    panel, calls = player
    before, first, second = panel.picture.value, panel.caption.value, "the digit 7 is moving down then up ."
    assert before[:3] == b"GIF" and not calls
    panel.caption.value, panel.speed.value, panel.seed.value = second, 0.25, 4
    assert calls == [(second, 0.5, 0), (second, 0.25, 0), (second, 0.25, 4)]
    assert panel.picture.value == display.gif_bytes(panel.video, panel.fps, panel.scale) != before
    assert "10 frames" in panel.message.value
    panel.button.click()
    assert calls[3:] == [(second, 0.25, 4)]
    panel.examples.value = panel.examples.options[1]
    assert panel.caption.value == calls[-1][0] == "the digit 7 is moving left then right ." != first
    assert len(calls) == 5


def test_the_panel_shows_the_picture_in_its_own_size(player):
    panel, _ = player
    shown = Image.open(io.BytesIO(panel.picture.value)).size
    assert (panel.picture.layout.width, panel.picture.layout.height) == tuple(f"{side}px" for side in shown)
    assert panel.picture.layout.align_self == "flex-start"   # a column stretches what says nothing of this


def test_the_panel_shows_the_grammar_s_error_and_lives_on(player):
    panel, calls = player
    before = panel.picture.value
    panel.caption.value = "the digit 7 is moving upp then down ."
    assert "upp" in panel.message.value and "Traceback" not in panel.message.value
    assert display.GENERATED in panel.message.value
    assert panel.picture.value == before and not panel.button.disabled and not calls
    panel.caption.value = "the digit 7 is moving up then down ."
    assert len(calls) == 1 and "upp" not in panel.message.value


def test_the_panel_escapes_what_was_typed(player):
    panel, _ = player
    panel.caption.value = "<img src=x onerror=alert(1)>"
    panel.button.click()
    assert "<img" not in panel.message.value and "&lt;img" in panel.message.value


def test_a_bug_in_a_generator_is_shown_and_raised():
    def broken(image, caption, speed, seed):
        raise KeyError("weights")

    panel = display.player(broken, torch.zeros(1, 16, 16), "a caption")
    with pytest.raises(KeyError):
        panel.play()
    assert "KeyError" in panel.message.value and not panel.button.disabled


def test_the_panel_is_a_widget_to_a_notebook(player):
    panel, _ = player
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()
    with pytest.raises(ValueError, match="open interval"):
        display.player(lambda *_: None, torch.zeros(1, 16, 16), "a", speed=0)
    with pytest.raises(ValueError, match="no captions"):
        display.player(lambda *_: None, torch.zeros(1, 16, 16), [])


# ----------------------------------------------------------------------------------------- the README's pictures


def test_the_readme_s_pictures_are_those_that_the_command_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "names", lambda: [])   # a model's pixels may differ in the last bit between machines
    drawn = display.readme_pictures(tmp_path)
    assert [path.name for path in drawn] == [f"{name}.gif" for name in (*moving_mnist.DATASETS, *cater.DATASETS)]
    for path in drawn[:3]:
        kept = Image.open(data_folder() / "pictures" / path.name)
        for frame, other in zip(ImageSequence.Iterator(Image.open(path)), ImageSequence.Iterator(kept), strict=True):
            assert np.array_equal(np.asarray(frame.convert("RGB")), np.asarray(other.convert("RGB")))


def test_the_readme_shows_what_the_command_draws():
    shown = set(re.findall(r"data/pictures/([\w-]+\.gif)", (data_folder().parent / "README.md").read_text()))
    worlds = {f"{name}.gif" for name in (*moving_mnist.DATASETS, *cater.DATASETS)}
    assert worlds <= shown <= worlds | {f"mage-{name}.gif" for name in weights.names()}
    assert all((data_folder() / "pictures" / name).exists() for name in shown)


def test_help_and_wrong_options_draw_no_pictures(monkeypatch):
    monkeypatch.setattr(display, "readme_pictures", lambda folder: pytest.fail("drawn"))
    for words, code in ((["--help"], 0), (["--dry-run"], 2)):
        with pytest.raises(SystemExit) as ended:
            display.main(words)
        assert ended.value.code == code


def test_a_panel_takes_8_bit_images_and_any_speed_and_says_what_seeds_it_has():
    given = []
    image = torch.randint(256, (1, 16, 16), dtype=torch.uint8)

    def generate(image, *others):
        given.append((image, *others))
        return torch.zeros(2, 1, 16, 16)

    display.player(generate, image, "go", speed=0.995).play()
    assert torch.equal(given[0][0], image / 255) and given[0][1:] == ("go", 0.995, 0)
    with pytest.raises(ValueError, match="seed is -3: the panel takes whole numbers from 0 to 2147483647"):
        display.player(generate, image, "go", seed=-3)


def test_a_small_thing_keeps_its_colour_in_a_gif():
    ramp = torch.linspace(0.2, 0.8, 64)
    video = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.full((64, 64), 0.4)])
    video = video.repeat(2, 1, 1, 1)
    video[:, :, 30:32, 30:32] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    with Image.open(io.BytesIO(display.gif_bytes(video))) as file:
        shown = np.asarray(file.convert("RGB")).astype(int)
    assert abs(shown - display.frames_uint8(video)[0]).max() <= 24
