import hashlib
import http.server
import io
import shutil
import tarfile
import threading

import pytest

from effseg.cli import main
from effseg.data import VOC
from effseg.data import download as module
from effseg.data.download import Archive, download, download_voc2012, extract, fetch, read_archives
from effseg.errors import InputError

CONTENT = bytes(range(256)) * 400
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`.

    `cut` is how many bytes an answer sends before it breaks off; `chunked` ones have no length.
    """

    def __init__(self):
        self.files, self.cut, self.ranges, self.requests = {}, None, True, []
        self.chunked = False
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/path/{name}?token=1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        content = server.files.get(self.path.split("?")[0].rsplit("/", 1)[-1])
        if content is None:
            self.send_error(404)
            return
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = content[start:]
        sent = body if server.cut is None else body[: server.cut]
        self.close_connection = True
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b" % (len(body), sent))
            self.wfile.write(b"\r\n0\r\n\r\n" if sent == body else b"")
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.files["data.bin"] = CONTENT
        yield server
        server.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_good_file(server, tmp_path):
    path = download(server.url("data.bin"), tmp_path / "new", MD5)
    assert path == tmp_path / "new/data.bin" and path.read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["data.bin"]
    download(server.url("data.bin"), tmp_path / "new", MD5)
    download(server.url("data.bin"), tmp_path / "new", MD5.upper())
    assert len(server.requests) == 1  # what is there is not fetched again


def test_wrong_sum_leaves_nothing(server, tmp_path):
    with pytest.raises(InputError, match=f"md5 {MD5}, expected {'0' * 32}"):
        download(server.url("data.bin"), tmp_path, "0" * 32)
    assert names(tmp_path) == []


def test_a_broken_file_from_elsewhere_is_refused(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT[:100])
    with pytest.raises(InputError, match=r"data\.bin: md5 .*delete the file"):
        download(server.url("data.bin"), tmp_path, MD5)
    assert (tmp_path / "data.bin").exists()


def test_a_broken_off_transfer_goes_on_by_itself(server, tmp_path):
    server.cut = 40_000
    path = download(server.url("data.bin"), tmp_path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=40000-", "bytes=80000-"]


def test_a_stopped_transfer_is_resumed_by_the_next_call(server, tmp_path):
    server.cut = 0
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(InputError, match=f"{len(CONTENT) - 1000} bytes are missing; run it again"):
        download(server.url("data.bin"), tmp_path, MD5)
    assert names(tmp_path) == ["data.bin.part"]
    server.cut = None
    assert download(server.url("data.bin"), tmp_path, MD5).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=1000-"


@pytest.mark.parametrize("md5", [MD5, None])
def test_a_transfer_in_chunks_that_breaks_off_is_not_complete(server, tmp_path, md5):
    server.chunked, server.cut = True, 0
    with pytest.raises(InputError, match="an unknown number of bytes is missing; run it again"):
        download(server.url("data.bin"), tmp_path, md5)
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(InputError, match="run it again"):
        download(server.url("data.bin"), tmp_path, md5)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:1000]
    server.cut = 40_000
    assert download(server.url("data.bin"), tmp_path, md5).read_bytes() == CONTENT
    assert server.requests[-3:] == ["bytes=1000-", "bytes=41000-", "bytes=81000-"]


@pytest.mark.parametrize("name", ["data.bin", "data.bin.part"])
def test_a_folder_of_the_files_name_is_known_before_the_transfer(server, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"/{name}: is a folder"):
        download(server.url("data.bin"), tmp_path, MD5)
    assert server.requests == [] and names(tmp_path) == [name]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "data.bin.part").write_bytes(b"old bytes")
    assert download(server.url("data.bin"), tmp_path, MD5).read_bytes() == CONTENT


def test_a_complete_part_is_only_checked(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download(server.url("data.bin"), tmp_path, MD5).read_bytes() == CONTENT


def test_unknown_file_and_unreachable_server(server, tmp_path):
    with pytest.raises(InputError, match=r"gone\.bin.*the server answers 404"):
        download(server.url("gone.bin"), tmp_path, None)
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/x: cannot be fetched"):
        download("http://127.0.0.1:9/x", tmp_path, None)
    assert names(tmp_path) == []


def make_tar(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def archive_of(server, name, content, creates):
    server.files[name] = content
    return Archive(name, server.url(name), hashlib.md5(content).hexdigest(), creates)


def test_addresses_and_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/sub: cannot be written: Not a directory"):
        download("http://127.0.0.1:1/a.tar", tmp_path / "file/sub")
    for url in ("a.tar", "http://127.0.0.1:1/a b.tar"):
        with pytest.raises(InputError, match=f"{url}: cannot be fetched: "):
            download(url, tmp_path)


def test_fetch_unpacks_once_and_deletes_the_archive(server, tmp_path):
    archive = make_tar({"top/data/a.txt": b"1", "top/readme": b"2"})
    expected = archive_of(server, "a.tgz", archive, "top/data")
    assert (fetch(expected, tmp_path) / "a.txt").read_bytes() == b"1"
    assert names(tmp_path) == ["top"] and names(tmp_path / "top") == ["data"]
    fetch(expected, tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar({"other/a": b"1"}), "holds no folder top/data"),
        (make_tar({"../evil": b"1", "top/data/a": b"1"}), "cannot be unpacked"),
        (make_tar({"top/data/a": bytes(9000)})[:60], "cannot be unpacked"),
        (b"no archive", "cannot be unpacked"),
    ],
    ids=["other", "outside", "truncated", "text"],
)
def test_bad_archives_leave_nothing(tmp_path, content, message):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.tgz").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.tgz: {message}"):
        extract(root / "a.tgz", root, "top/data")
    assert names(root) == ["a.tgz"] and names(tmp_path) == ["root"]


def test_voc_2012(server, tmp_path, voc, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(voc.root / "VOCdevkit", "VOCdevkit")
    sbd = make_tar({"benchmark_RELEASE/dataset/train.txt": b"a0"})
    sources = [
        archive_of(server, "voc.tar", buffer.getvalue(), "VOCdevkit/VOC2012"),
        archive_of(server, "sbd.tgz", sbd, "benchmark_RELEASE/dataset"),
    ]
    monkeypatch.setattr(module, "read_archives", lambda card: sources)
    root = tmp_path / "fetched"
    assert download_voc2012(root) == root / "VOCdevkit/VOC2012"
    download_voc2012(root)
    assert names(root) == ["VOCdevkit", "benchmark_RELEASE"]
    assert len(server.requests) == 2
    # A source downloads what is missing, wherever the rest is.
    for place in (voc.root, voc.folder.parent, voc.folder, root / "VOCdevkit"):
        VOC(place, download=True).prepare()
    VOC(root, "train", "val", download=True).prepare()
    assert len(server.requests) == 2, "all of them are complete"
    shutil.rmtree(voc.folder / "SegmentationClassAug")
    VOC(voc.folder, "train", "val", download=True).prepare()
    assert len(server.requests) == 2, "without train_aug none is missing"
    VOC(voc.folder, download=True).prepare()
    assert (voc.root / "benchmark_RELEASE/dataset/train.txt").is_file()
    VOC(tmp_path / "new", download=True).prepare()
    assert names(tmp_path / "new") == ["VOCdevkit"], "its folder of masks came with it"


def test_the_card_names_both_archives():
    first, second = read_archives("voc2012")
    assert first.creates == "VOCdevkit/VOC2012" and second.creates == "benchmark_RELEASE/dataset"
    assert all(len(each.md5) == 32 and each.url.startswith("https://") for each in (first, second))
    assert read_archives("shapes") == []


def test_the_command_takes_the_name_of_the_dataset(monkeypatch, tmp_path, capsys):
    roots = []
    monkeypatch.setattr("effseg.data.download.download_voc2012", lambda root: roots.append(root))
    assert main(["data", "download", "voc2012", "--root", str(tmp_path)]) == 0
    assert roots == [tmp_path]
    assert main(["data", "download", "ade20k"]) == 2
    assert "voc2012" in capsys.readouterr().err
