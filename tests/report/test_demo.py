"""The demo, over HTTP as a browser asks it."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from effseg import from_pretrained
from effseg.data.files import read_image
from effseg.report import demo as module


@pytest.fixture(scope="module")
def served(finished_run):
    """Serve a run's model as the command does, with limits that a test can reach; the app."""
    ready, end, apps = threading.Event(), threading.Event(), []

    def block(app):
        apps.append(app)
        ready.set()
        end.wait()
        app.close(verbose=False)

    def serve():
        try:
            module.serve(from_pretrained(finished_run).eval(), "tiny", "127.0.0.1", None)
        finally:
            ready.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.Blocks.block_thread", block)
        patch.setattr(module, "MAX_MEGABYTES", 1)
        patch.setattr(module, "MAX_PIXELS", 10_000)
        thread = threading.Thread(target=serve)
        thread.start()
        ready.wait()
        try:
            yield apps[0]
        finally:
            end.set()
            thread.join()


def test_a_dropped_image_is_segmented(served, finished_run, shapes_root):
    path = next((shapes_root / "JPEGImages").glob("val*"))
    client = Client(served.local_url, verbose=False)
    drawn, text, mask = client.predict(handle_file(path), 0.3, 1.0, api_name="/predict")
    labels = Image.open(mask)
    assert labels.mode == "P" and labels.size == (96, 64)
    expected = module.Predictor(from_pretrained(finished_run).eval()).labels([read_image(path)])
    assert np.array_equal(np.asarray(labels), expected[0].numpy())
    assert text == ""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    plain = client.predict(handle_file(path), 0.3, 0.0, api_name="/predict")[0]
    changed = [
        np.abs(np.asarray(Image.open(p).convert("RGB"))[:64, :96].astype(int) - image).sum()
        for p in (plain, drawn)
    ]
    assert changed[0] <= changed[1]


def test_uploads_have_a_limit_in_bytes_and_in_pixels(served, tmp_path):
    files = {"files": ("large.png", b"x" * (1 << 21), "image/png")}
    answer = httpx.post(f"{served.local_url}gradio_api/upload", files=files)
    assert answer.status_code == 413
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    Image.effect_noise((90, 90), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-900])
    client = Client(served.local_url, verbose=False)
    for name, words in (("wide.png", "200 × 100"), ("cut.png", "cut.png")):
        with pytest.raises(AppError, match=words) as caught:
            client.predict(handle_file(tmp_path / name), 0.3, 0.5, api_name="/predict")
        assert "gradio/" not in str(caught.value)  # no path of the server


def test_it_listens_on_loopback_and_shares_nothing(served):
    assert served.server_name == "127.0.0.1"
    assert served.share_url is None
    page = httpx.get(served.local_url).text
    assert "fonts.googleapis.com" not in page


def test_the_slider_draws_anew_without_the_model(finished_run, shapes_root):
    path = next((shapes_root / "JPEGImages").glob("val*"))
    demo = module.Demo(from_pretrained(finished_run).eval(), "tiny")
    *_, prediction = demo.predict(str(path), 0.3, 0.5)
    demo.predictor = None
    first, again = (demo.draw(prediction, 0.3, opacity)[0] for opacity in (0.5, 0.5))
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert demo.draw(None, 0.3, 0.5) == (None, "")
    assert demo.predict(None, 0.3, 0.5)[0] is None


def test_masks_stay_in_the_demos_folder_whatever_a_client_calls_itself(
    finished_run, shapes_root, tmp_path
):
    path = next((shapes_root / "JPEGImages").glob("val*"))
    demo = module.Demo(from_pretrained(finished_run).eval(), "tiny")
    inside = Path(demo.folder.name).resolve()
    files = set()
    for visitor in ("one", "two", str(tmp_path / "evil"), "../../evil", "x" * 300, "\ud800"):
        request = SimpleNamespace(session_hash=visitor)
        file = Path(demo.predict(str(path), 0.3, 0.5, request)[2]).resolve()
        assert file.is_relative_to(inside)
        files.add(file)
    assert len(files) == 6 and not (tmp_path / "evil").exists()


def test_a_port_that_is_taken_is_one_line(effseg, finished_run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = effseg("demo", "--model", finished_run, "--port", port)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ") and str(port) in err


@pytest.mark.parametrize(
    "flags", [("--port", 99999), ("--host", "nowhere.invalid"), ("--device", "gpu")]
)
def test_an_address_or_device_that_does_not_exist_is_one_line(effseg, finished_run, flags):
    code, _, err = effseg("demo", "--model", finished_run, *flags)
    assert code == 2
    assert err.count("rror") == 1 and str(flags[1]) in err.splitlines()[-1]


def test_no_such_model_is_one_line(effseg, tmp_path):
    code, _, err = effseg("demo", "--model", tmp_path)
    assert code == 2
    assert err.count("\n") == 1 and str(Path(tmp_path)) in err
