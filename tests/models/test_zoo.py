"""Weights by name: the published checkpoints, fetched from a local server."""

import hashlib
import http.server
import importlib.metadata
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import effseg
from effseg import InputError
from effseg.models import zoo
from effseg.models.registry import list_models
from effseg.models.scaling import SCALING
from effseg.models.zoo import PUBLISHED, RELEASE, Published, weights_of


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from where the client asks; `cut` bytes at a time."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if not self.path.endswith(server.file):
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        body = server.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def detector():
    """Another lite0 than create_model's."""
    torch.manual_seed(5)
    model = effseg.create_model("efficientdet_lite0").eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def content(detector):
    buffer = io.BytesIO()
    torch.save(effseg.to_effdet(detector), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(content, monkeypatch, tmp_path):
    digits = hashlib.sha256(content).hexdigest()[:8]
    published = Published(f"tf_efficientdet_lite0-{digits}.pth", 27.1)
    monkeypatch.setitem(zoo.PUBLISHED, "lite0", published)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cut, server.file, server.requests = content, None, published.file, []
        monkeypatch.setenv("EFFSEG_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/weights")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def checkpoints(tmp_path):
    return sorted(p for p in (tmp_path / "hub" / "checkpoints").iterdir() if p.suffix != ".lock")


def test_the_names_are_effdets():
    effdet = pytest.importorskip("effdet")
    configs = effdet.config.model_config.efficientdet_model_param_dict
    urls = {size: configs[f"tf_efficientdet_{size}"]["url"] for size in SCALING}
    assert urls == {size: f"{RELEASE}/{row.file}" for size, row in PUBLISHED.items()}
    readme = importlib.metadata.metadata("effdet").get_payload()
    rows = re.findall(r"^\| tf_efficientdet_(\w+) +\| +([\d.]+) ", readme, re.MULTILINE)
    stated = {size: float(ap) for size, ap in rows}
    assert {size: stated[size] for size in SCALING} == {k: v.ap for k, v in PUBLISHED.items()}
    assert all(re.fullmatch(r"[0-9a-f]{8}", row.sha256) for row in PUBLISHED.values())


def test_the_published_detector_is_fetched_once_and_keeps_cocos_names(server, detector, tmp_path):
    for _ in range(2):
        model = effseg.create_model("efficientdet_lite0", weights="coco").eval()
    assert [path for path, _ in server.requests] == [f"/weights/{server.file}"]
    assert [path.name for path in checkpoints(tmp_path)] == [server.file]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(model(images), detector(images), strict=True):
            assert torch.equal(a, b)
    names = model.config["_class_names"]
    assert len(names) == 91 and names[:3] == ["background", "person", "bicycle"]
    assert names[12] == "id 12" and names[90] == "toothbrush"
    again = effseg.from_pretrained("efficientdet_lite0")
    assert again.config["_class_names"] == names and len(server.requests) == 1


def test_an_interrupted_download_resumes(server, tmp_path, content):
    server.cut = len(content) // 2 + 1
    path = zoo.fetch_published("lite0")
    assert path.read_bytes() == content
    assert [asked for _, asked in server.requests] == [None, f"bytes={server.cut}-"]


def test_a_wrong_checksum_is_refused_and_the_file_removed(server, tmp_path):
    server.content = b"x" + server.content[1:]
    with pytest.raises(InputError, match=rf"sha256 \w+, expected {server.file[-12:-4]} ") as error:
        effseg.create_model("efficientdet_lite0", weights="coco")
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path) == []


def test_offline_one_line_names_the_file_and_its_path(server, tmp_path, monkeypatch, content):
    monkeypatch.setenv("EFFSEG_WEIGHTS_URL", "http://127.0.0.1:1/weights")
    with pytest.raises(InputError) as error:
        effseg.create_model("efficientdet_lite0", weights="coco")
    target = tmp_path / "hub" / "checkpoints" / server.file
    assert str(error.value).endswith(f"; or put the file at {target}")
    assert f"/weights/{server.file}: cannot be fetched" in str(error.value)
    assert "\n" not in str(error.value)
    target.write_bytes(content)
    effseg.create_model("efficientdet_lite0", weights="coco")


def test_of_concurrent_calls_one_downloads(server, content):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(zoo.fetch_published, ["lite0"] * 3))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == content
    assert len(server.requests) == 1


def test_another_class_count_prints_one_line(server, detector, capsys):
    model = effseg.create_model("efficientdet_lite0", weights="coco", classes=3)
    lines = capsys.readouterr().out.strip().splitlines()
    said = [line for line in lines if "fresh" in line]
    assert len(said) == 1 and said[0].startswith("weights=coco: 2 tensors start fresh: detection_")
    state, theirs = model.state_dict(), detector.state_dict()
    other = {key for key, value in theirs.items() if state[key].shape != value.shape}
    assert other == {
        f"detection_head.class_net.predict.pointwise.{name}" for name in ("weight", "bias")
    }
    assert all(torch.equal(state[key], value) for key, value in theirs.items() if key not in other)
    assert "_class_names" not in model.config


@pytest.mark.parametrize("name", ["effseg_lite0", "effsegdet_lite0"])
def test_a_detectors_trunk(server, detector, capsys, name):
    model = effseg.create_model(name, weights="coco-detection")
    assert capsys.readouterr().out.count("weights=coco-detection: ") == 1
    theirs = detector.encoder.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in model.encoder.state_dict().items())
    # The top-down node of P6, the first of both graphs.
    first = model.decoder.cells[0].nodes["0"].conv.pointwise.weight
    assert torch.equal(first, detector.decoder.cells[0].nodes["0"].conv.pointwise.weight)


def test_unavailable_weights_are_refused():
    with pytest.raises(InputError, match=r"effseg_d4.*weights='coco', expected 'coco-detection'"):
        effseg.create_model("effseg_d4", weights="coco")
    with pytest.raises(InputError, match=r"weights='voc', expected 'coco'$"):
        effseg.create_model("efficientdet_d0", weights="voc")
    with pytest.raises(InputError, match=r"effseg_d4: has no trained weights"):
        effseg.from_pretrained("effseg_d4")
    assert all(weights_of(name) for name in list_models())
