import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import InputError, Predictor
from effseg.inference.video import Video, VideoWriter

av = pytest.importorskip("av", reason="needs the extra video")


def write_video(path, images=12, rate=Fraction(30000, 1001), size=(48, 64), codec="mpeg4", sound=0):
    """Write a video whose frames get brighter from left to right and with time."""
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=16000) if sound else None
        for number in range(images):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[:, : width // 2] = 10 * (number % 12)
            pixels[:, width // 2 :] = 120 + 10 * (number % 12)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            silence = np.zeros((1, 16000 * sound), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def turn(path):
    """Write a rotation by 90 degrees into the header of an mp4, as phones do."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = turned
    path.write_bytes(content)


def read(path):
    with Video(path) as video:
        images = list(video.images())
    return video, images


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_images_of_a_video_in_order(tmp_path, suffix):
    video, images = read(write_video(tmp_path / f"x{suffix}"))
    assert len(images) == 12
    assert {tuple(image.shape) for image in images} == {(3, 48, 64)}
    left = [float(image[:, 4:-4, 4:28].float().mean()) for image in images]
    assert left == pytest.approx([10 * i for i in range(12)], abs=12)
    assert float(video.rate) == pytest.approx(29.97, abs=0.01)


def test_turned_as_players_show_it(tmp_path):
    path = write_video(tmp_path / "x.mp4")
    turn(path)
    _, images = read(path)
    assert images[0].shape == (3, 64, 48)
    # Turned by a quarter to the right: what was left is at the top.
    assert images[0][:, 4:28].float().mean() < 30 < 90 < images[0][:, 36:60].float().mean()


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(25), Fraction(90001, 3001)])
def test_what_is_written_has_the_same_images_and_times(tmp_path, rate):
    path = write_video(tmp_path / "x.mp4", rate=rate, codec="libx264")
    with Video(path) as video, VideoWriter(tmp_path / "y.mp4", video) as writer:
        for image in video.images():
            writer.write(Image.fromarray(image.permute(1, 2, 0).numpy()[:47, :63]))  # odd sides
    again, images = read(tmp_path / "y.mp4")
    assert len(images) == 12 and images[0].shape == (3, 48, 64)

    def seconds(video):
        return [float((t - video.times[0]) * video.time_base) for t in video.times]

    assert seconds(again) == pytest.approx(seconds(video), abs=1e-3)
    assert float(again.rate) == pytest.approx(float(rate), rel=1e-3)


def test_uneven_times_are_kept(tmp_path):
    times = [0, 1, 2, 10, 11, 30]
    source = write_video(tmp_path / "x.mp4", images=6, rate=Fraction(10))
    with Video(source) as video:
        images = list(video.images())
        step = video.times[1] - video.times[0]
        video.times = [t * step for t in times]
        with VideoWriter(tmp_path / "y.mp4", video) as writer:
            for image in images:
                writer.write(Image.fromarray(image.permute(1, 2, 0).numpy()))
    again, _ = read(tmp_path / "y.mp4")
    assert [round(float(t * again.time_base), 3) for t in again.times] == [t / 10 for t in times]


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mp4"])
def test_cut_in_the_middle(tmp_path, suffix):
    path = write_video(tmp_path / f"x{suffix}", images=200, rate=Fraction(25))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"x{suffix}: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def copy(source, target, start=0.0, hold=0.0, **options):
    """Copy a video without encoding: from `start` on, the last image held for `hold`, seconds."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        packets = [packet for packet in old.demux(stream) if packet.dts is not None]
        packets[-1].duration += round(hold / stream.time_base)
        copied = new.add_stream_from_template(stream)
        for packet in packets:
            packet.pts -= round(start / stream.time_base)
            packet.dts -= round(start / stream.time_base)
            packet.stream = copied
            new.mux(packet)
    return target


def test_images_that_trimming_hid_are_not_missing(tmp_path):
    source = write_video(tmp_path / "x.mp4", images=60, rate=Fraction(25), codec="libx264")
    path = copy(source, tmp_path / "y.mp4", start=1.0, movflags="faststart")
    with Video(path) as video:
        assert video._stream.frames == 60
    assert len(read(path)[1]) == 35
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(InputError, match=r"y\.mp4: video is cut or corrupt"):
        read(path)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_sound_may_be_longer_than_the_images(tmp_path, suffix):
    path = write_video(tmp_path / f"x{suffix}", images=20, rate=Fraction(10), sound=10)
    assert len(read(path)[1]) == 20
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 9])
    with pytest.raises(InputError, match=f"x{suffix}: "):
        read(path)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_last_image_may_be_held(tmp_path, suffix):
    source = write_video(tmp_path / f"x{suffix}", images=20, rate=Fraction(10))
    assert len(read(copy(source, tmp_path / f"y{suffix}", hold=10.0))[1]) == 20


def test_what_is_no_video(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video at all" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("x.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(InputError, match=f"{name}: not a video that can be read"):
            Video(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4: no images"):
        Video(tmp_path / "sound.mp4")


def test_the_predictor_streams_a_video(saved, tmp_path):
    path = write_video(tmp_path / "x.mp4", images=6)
    results = list(Predictor(saved["both"])(path, stream=True))
    assert [r.frame for r in results] == list(range(6))
    assert {r.path for r in results} == {path}
    (alone,) = Predictor(saved["both"])([results[3].image])
    assert torch.equal(alone.mask, results[3].mask)
