"""prepare_data.py: downloads over a loopback server, archives good and evil, verification, conversion, rendering."""

import errno
import hashlib
import io
import os
import random
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prepare_data import main
from utils.data import archives, mvtec

OFFICIAL = mvtec.COUNTS
TINY = {"bottle": (3, 1, 2), "tile": (2, 2, 1)}  # stands in for the official counts


def tree(counts=TINY):
    """What the files of a data set with these counts are called."""
    for name, (train, good, defects) in counts.items():
        yield from (f"{name}/train/good/{i:03d}.png" for i in range(train))
        yield from (f"{name}/test/good/{i:03d}.png" for i in range(good))
        for i in range(defects):
            yield from (f"{name}/test/crack/{i:03d}.png", f"{name}/ground_truth/crack/{i:03d}_mask.png")


def write_tree(root, files=None):
    for file in files or tree():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"picture")


def make_archive(path, files=None, evil=None):
    noise = random.Random(0)
    with tarfile.open(path, "w:xz") as tar:
        for name in [*(files or tree()), "license.txt"]:
            member = tarfile.TarInfo(name)
            member.size = 5000
            tar.addfile(member, io.BytesIO(noise.randbytes(member.size)))
        if evil:
            tar.addfile(evil)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_under(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


INSTALLED = sorted([*tree(), "license.txt"])
FETCHED = sorted([*INSTALLED, mvtec.ARCHIVE])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(mvtec, "COUNTS", TINY)


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "archive.tar.xz")


@pytest.fixture
def server(archive, monkeypatch):
    """Serves the archive. ``requests`` logs (Range, If-Range); the other attributes make it misbehave."""
    state = SimpleNamespace(
        data=archive.read_bytes(), ranges=True, etag='"v1"', length=True, status=None, cuts=[], requests=[]
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            state.requests.append((asked, self.headers["If-Range"]))
            if state.status:
                return self.send_error(state.status)
            start = 0
            if asked and state.ranges and self.headers["If-Range"] in (None, state.etag):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(state.data):
                return self.send_error(416)
            body = state.data[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.data) - 1}/{len(state.data)}")
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/data.tar.xz"
    state.sha256 = sha256(archive)
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def fetch(server, tmp_path, capsys):
    """Run ``mvtec OUT`` against the server; returns the exit code and the lines on stderr."""

    def run(*options):
        source = ["--url", server.url, "--sha256", server.sha256, "--accept-licence"]
        code = main(["mvtec", str(tmp_path / "out"), *source, *options])
        return code, capsys.readouterr().err.splitlines()

    return run


def use_archive(path, out, capsys):
    code = main(["mvtec", str(out), "--archive", str(path), "--sha256", sha256(path), "--accept-licence"])
    return code, capsys.readouterr().err.splitlines()


def part(tmp_path):
    return tmp_path / "out" / f"{mvtec.ARCHIVE}.part"


# --- download


def test_download_unpacks_all(fetch, server, tmp_path):
    assert fetch() == (0, [])
    assert files_under(tmp_path / "out") == FETCHED
    assert server.requests == [(None, None)]


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_cut_connection_is_taken_up_where_it_ended(fetch, server, tmp_path, etag):
    server.etag, server.cuts = etag, [20_000, 7_000]
    assert fetch() == (0, [])
    assert files_under(tmp_path / "out") == FETCHED
    assert server.requests == [(None, None), ("bytes=20000-", etag), ("bytes=27000-", etag)]


def test_the_next_run_goes_on_where_a_failed_one_ended(fetch, server, tmp_path):
    server.cuts = [20_000, 0]
    code, [error] = fetch()
    assert code == 2 and "cannot be reached" in error and "--archive" in error
    assert part(tmp_path).stat().st_size == 20_000
    assert fetch() == (0, [])
    assert server.requests[-1] == ("bytes=20000-", '"v1"')
    assert files_under(tmp_path / "out") == FETCHED


def test_a_server_without_ranges_starts_anew(fetch, server, tmp_path):
    server.ranges, server.cuts = False, [20_000]
    assert fetch() == (0, [])
    assert [asked for asked, _ in server.requests] == [None, "bytes=20000-"]
    assert files_under(tmp_path / "out") == FETCHED


def test_a_server_without_ranges_that_always_cuts_ends_in_an_error(fetch, server):
    server.ranges, server.cuts = False, [20_000] * 9
    code, [error] = fetch()
    assert code == 2 and "the connection ended" in error
    assert len(server.requests) == 2


def test_a_file_that_changed_on_the_server_starts_anew(fetch, server, tmp_path):
    server.cuts = [20_000, 0]
    assert fetch()[0] == 2
    other = make_archive(tmp_path / "other.tar.xz", [*tree(), "news.txt"])
    server.data, server.sha256, server.etag = other.read_bytes(), sha256(other), '"v2"'
    assert fetch() == (0, [])
    assert (tmp_path / "out" / "news.txt").exists()


def test_a_part_that_is_all_of_the_file_is_used(fetch, server, tmp_path):
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(server.data)
    assert fetch() == (0, [])
    assert files_under(tmp_path / "out") == FETCHED


def test_a_server_that_does_not_tell_the_length(fetch, server, tmp_path):
    server.length = False
    assert fetch() == (0, [])
    assert files_under(tmp_path / "out") == FETCHED


def test_a_wrong_checksum_is_one_line_and_the_file_is_not_kept(fetch, server, tmp_path):
    server.sha256 = "0" * 64
    code, [error] = fetch()
    assert code == 2 and sha256(tmp_path / "archive.tar.xz") in error and "0" * 64 in error
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_says_what_else_one_can_do(fetch, server, tmp_path, status):
    server.status = status
    code, [error] = fetch()
    assert code == 2 and f"HTTP {status}" in error and "--archive FILE" in error
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/data.tar.xz"
    assert main(["mvtec", str(tmp_path / "out"), "--url", url, "--accept-licence"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "cannot be reached" in error and "refused" in error


@pytest.mark.parametrize("url", ["data.tar.xz", "ftp://host/data.tar.xz", "http://", "http://a..b/c", "http://a b/c"])
def test_a_wrong_address(tmp_path, capsys, url):
    assert main(["mvtec", str(tmp_path / "out"), "--url", url, "--accept-licence"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert url in error


def test_a_disk_that_is_too_small_is_known_at_the_start(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=len(server.data)))
    code, [error] = fetch()
    assert code == 2 and "are needed" in error
    assert files_under(tmp_path / "out") == []


def test_a_disk_that_fills_up_keeps_what_has_arrived(fetch, server, tmp_path, monkeypatch):
    def blocks(response):
        yield response.read(20_000)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_blocks", blocks)
        code, [error] = fetch()
    assert code == 2 and "is full" in error
    assert part(tmp_path).stat().st_size == 20_000
    assert fetch() == (0, [])
    assert server.requests[-1][0] == "bytes=20000-"


def test_an_interrupted_download_goes_on_later(fetch, server, tmp_path, monkeypatch):
    def blocks(response):
        yield response.read(20_000)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_blocks", blocks)
        assert fetch()[0] == 130
    assert fetch() == (0, [])
    assert server.requests[-1][0] == "bytes=20000-"


def test_an_archive_whose_unpacking_was_interrupted_is_not_fetched_again(fetch, server, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupted)
        assert fetch()[0] == 130
    assert os.listdir(tmp_path / "out") == [mvtec.ARCHIVE]
    assert fetch() == (0, [])
    assert len(server.requests) == 1
    assert files_under(tmp_path / "out") == FETCHED


# --- archive


def test_an_archive_at_hand_is_used_and_kept(archive, tmp_path, capsys):
    assert use_archive(archive, tmp_path / "out", capsys) == (0, [])
    assert files_under(tmp_path / "out") == INSTALLED
    assert archive.exists()


def test_the_licence_must_be_accepted(archive, tmp_path, capsys):
    assert main(["mvtec", str(tmp_path / "out"), "--archive", str(archive)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "CC BY-NC-SA 4.0" in error and "--accept-licence" in error
    assert not (tmp_path / "out").exists()


def test_another_archive_than_the_official_one_is_refused_and_kept(archive, tmp_path, capsys):
    assert main(["mvtec", str(tmp_path / "out"), "--archive", str(archive), "--accept-licence"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert sha256(archive) in error and mvtec.SHA256 in error
    assert archive.exists()


def test_a_damaged_archive_in_out_is_not_trusted(fetch, server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / mvtec.ARCHIVE).write_bytes(server.data[:-1])
    code, [error] = fetch()
    assert code == 2 and mvtec.ARCHIVE in error and "fetch it again" in error
    assert os.listdir(tmp_path / "out") == [mvtec.ARCHIVE]


def test_read_only_members_become_the_user_s_own(tmp_path, capsys):
    archive = tmp_path / "a.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for name in ["bottle", "bottle/train", "bottle/train/good"]:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o555
            tar.addfile(folder)
        for name in tree():
            member = tarfile.TarInfo(name)
            member.size, member.mode = 7, 0o444
            tar.addfile(member, io.BytesIO(b"picture"))
    assert use_archive(archive, tmp_path / "out", capsys) == (0, [])
    folder = tmp_path / "out/bottle/train/good"
    assert folder.stat().st_mode & 0o700 == 0o700 and (folder / "000.png").stat().st_mode & 0o600 == 0o600


def test_no_such_archive(tmp_path, capsys):
    assert main(["mvtec", str(tmp_path), "--archive", str(tmp_path / "none.tar.xz"), "--accept-licence"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "none.tar.xz" in error


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "evil",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("tile/../../../evil"),
        tarfile.TarInfo("/evil"),
        link("evil", "../../outside", tarfile.SYMTYPE),
        link("evil", "/etc", tarfile.SYMTYPE),
        link("evil", "../../outside", tarfile.LNKTYPE),
        link("evil", "", tarfile.FIFOTYPE),
    ],
    ids=lambda evil: f"{evil.name}{evil.linkname}",
)
def test_a_member_that_could_escape_is_refused(tmp_path, capsys, evil):
    archive = make_archive(tmp_path / "evil.tar.xz", evil=evil)
    write_tree(tmp_path / "out", tree({"bottle": TINY["bottle"]}))
    before = files_under(tmp_path)
    code, [error] = use_archive(archive, tmp_path / "out", capsys)
    assert code == 2 and "is refused" in error and "evil" in error
    assert files_under(tmp_path) == before
    assert os.listdir(tmp_path / "out") == ["bottle"]


@pytest.mark.parametrize("kept", [0, 10, 30_000, -1000])
def test_a_truncated_archive_is_one_line(archive, tmp_path, capsys, kept):
    archive.write_bytes(archive.read_bytes()[:kept])
    code, [error] = use_archive(archive, tmp_path / "out", capsys)
    assert code == 2 and "damaged or cut short" in error
    assert not os.listdir(tmp_path / "out")


def test_an_archive_that_lacks_something_is_refused(tmp_path, capsys):
    archive = make_archive(tmp_path / "a.tar.xz", [f for f in tree() if f != "tile/ground_truth/crack/000_mask.png"])
    code, [error] = use_archive(archive, tmp_path / "out", capsys)
    assert code == 2 and "tile/ground_truth/crack/000_mask.png is missing" in error
    assert not os.listdir(tmp_path / "out")


# --- an existing tree


def test_the_official_counts_add_up_to_the_published_totals():
    assert len(OFFICIAL) == 15
    assert [sum(column) for column in zip(*OFFICIAL.values(), strict=True)] == [3629, 467, 1258]


def test_a_whole_tree_is_verified_and_nothing_is_fetched(fetch, server, tmp_path, capsys):
    write_tree(tmp_path / "out")
    assert main(["mvtec", str(tmp_path / "out")]) == 0  # neither licence nor network are needed
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["bottle", "3", "1", "2", "2", "complete"] in lines
    assert ["total", "5", "3", "3", "3"] in lines
    assert fetch() == (0, [])
    assert server.requests == []


@pytest.mark.parametrize(
    "lost",
    [
        "bottle/ground_truth/crack/001_mask.png",
        "bottle/train/good/002.png",
        "bottle/test/good/000.png",
        "bottle/test/crack/001.png",
    ],
)
@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_what_is_missing_is_listed_and_nothing_is_touched(fetch, server, tmp_path, capsys, lost, how):
    write_tree(tmp_path / "out")
    (tmp_path / "out" / lost).unlink() if how == "deleted" else (tmp_path / "out" / lost).write_bytes(b"")
    before = files_under(tmp_path / "out")
    assert main(["mvtec", str(tmp_path / "out"), "--verify-only"]) == 2
    output = capsys.readouterr()
    named = f"{lost} is missing" if "mask" in lost else os.path.dirname(lost).replace("crack", "<defects>")
    assert named in output.out
    [error] = output.err.splitlines()
    assert error.endswith("incomplete: bottle")
    code, [error] = fetch()
    assert code == 2 and "move or delete" in error and server.requests == []
    assert files_under(tmp_path / "out") == before


def test_a_surplus_image_is_a_difference(tmp_path, capsys):
    write_tree(tmp_path, [*tree(), "tile/train/good/extra.png"])
    assert main(["mvtec", str(tmp_path), "--verify-only"]) == 2
    assert "tile/train/good has 3 images instead of 2" in capsys.readouterr().out


def test_a_long_list_of_differences_is_shortened(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mvtec, "COUNTS", {"tile": (1, 1, 40)})
    write_tree(tmp_path, [file for file in tree(mvtec.COUNTS) if "ground_truth" not in file])
    assert main(["mvtec", str(tmp_path), "--verify-only"]) == 2
    output = capsys.readouterr().out
    assert output.count("_mask.png is missing") == 10 and "... and 30 more" in output


def test_missing_categories_are_added_and_the_others_are_not_touched(fetch, tmp_path):
    write_tree(tmp_path / "out", [*tree({"bottle": TINY["bottle"]}), "bottle/notes.txt"])
    assert fetch() == (0, [])
    assert files_under(tmp_path / "out") == sorted([*FETCHED, "bottle/notes.txt"])
    assert (tmp_path / "out/bottle/train/good/000.png").read_bytes() == b"picture"
    assert (tmp_path / "out/tile/train/good/000.png").stat().st_size == 5000


def test_verify_only_of_nothing(tmp_path, capsys):
    assert main(["mvtec", str(tmp_path / "none"), "--verify-only"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "bottle, tile" in error
    assert not (tmp_path / "none").exists()


# --- Magnetic Tile Defects


@pytest.fixture
def checkout(tmp_path):
    """Eleven good tiles and two of each defect, not square, with masks in the modes that occur."""
    root = tmp_path / "checkout"
    for kind, count in {"Free": 11, "Blowhole": 2, "Break": 2, "Crack": 2, "Fray": 2, "Uneven": 2}.items():
        folder = root / f"MT_{kind}" / "Imgs"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (20 + i, 10), 100 + i).save(folder / f"exp1_num_{i:02d}.jpg")
            mask = np.zeros((10, 20 + i), np.uint8)
            mask[2:5, 3:9] = 1 if kind == "Crack" else 255
            mask = Image.fromarray(mask)
            (mask.convert("1") if kind == "Fray" else mask).save(folder / f"exp1_num_{i:02d}.png")
    return root


def test_magnetic_tiles_become_a_category(checkout, tmp_path, capsys):
    assert main(["mtd", str(checkout), str(tmp_path / "out")]) == 0
    category = tmp_path / "out" / "magnetic_tile"
    assert os.listdir(tmp_path / "out") == ["magnetic_tile"]
    assert len(files_under(category)) == 11 + 5 * 2 * 2
    originals = sorted((checkout / "MT_Free" / "Imgs").glob("*.jpg"))
    for split, numbers in {"test": [0, 5, 10], "train": [1, 2, 3, 4, 6, 7, 8, 9]}.items():
        for target, number in enumerate(numbers):
            copy = category / split / "good" / f"{target:03d}.jpg"
            assert copy.read_bytes() == originals[number].read_bytes()
    for kind in ("blowhole", "break", "crack", "fray", "uneven"):
        for i in range(2):
            with (
                Image.open(category / "test" / kind / f"{i:03d}.jpg") as image,
                Image.open(category / "ground_truth" / kind / f"{i:03d}_mask.png") as mask,
            ):
                assert image.size == mask.size == (20 + i, 10)
                found = np.asarray(mask)
            expected = np.zeros((10, 20 + i), np.uint8)
            expected[2:5, 3:9] = 255
            np.testing.assert_array_equal(found, expected)
    capsys.readouterr()
    assert main(["mtd", str(checkout), str(tmp_path / "out")]) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("MT_Break/Imgs", None, ["MT_Break", "checkout of https://"]),
        ("MT_Crack/Imgs/exp1_num_01.png", None, ["MT_Crack", "exp1_num_01.png"]),
        ("MT_Fray/Imgs/exp1_num_00.png", (7, 7), ["MT_Fray", "exp1_num_00.png", "7 x 7", "20 x 10"]),
        ("MT_Free/Imgs/exp1_num_03.jpg", b"\xff\xd8 no image", ["MT_Free", "exp1_num_03.jpg"]),
    ],
)
def test_a_faulty_checkout_is_named_and_leaves_nothing(checkout, tmp_path, capsys, path, content, words):
    if content is None:
        (checkout / path).rename(tmp_path / "moved away")
    elif isinstance(content, bytes):
        (checkout / path).write_bytes(content)
    else:
        Image.new("L", content).save(checkout / path)
    assert main(["mtd", str(checkout), str(tmp_path / "out")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


# --- rendered sample


@pytest.fixture
def renderer(monkeypatch):
    """A renderer of two tiny categories, which can be told to fail before the last file."""
    state = SimpleNamespace(calls=0, error=None)

    def render(out, **options):
        state.calls += 1
        *files, last = tree({"tile": (2, 1, 3), "wood": (2, 1, 3)})
        write_tree(out, files)
        if state.error:
            raise state.error
        write_tree(out, [last])

    parts = {"tile": (None, ("crack", "hole", "stain")), "wood": (None, ("a", "b", "c"))}
    for name, value in {"TRAIN": 2, "GOOD": 1, "DEFECTS": 1, "PARTS": parts, "render_sample": render}.items():
        monkeypatch.setattr(f"utils.data.sample_data.{name}", value)
    return state


def test_the_sample_is_rendered_once_and_labelled(renderer, tmp_path, capsys):
    for message in ("", "holds the sample already"):
        assert main(["sample", str(tmp_path / "my set")]) == 0
        output = capsys.readouterr().out
        assert message in output and "RENDERED" in output
        assert f"python train.py --data-path '{tmp_path}/my set' --category all" in output
    assert renderer.calls == 1
    assert len(files_under(tmp_path / "my set")) == 2 * (2 + 1 + 3 + 3)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left"), 2)])
def test_an_interrupted_rendering_leaves_nothing(renderer, tmp_path, error, code):
    renderer.error = error
    assert main(["sample", str(tmp_path / "set")]) == code
    assert not os.listdir(tmp_path)
    renderer.error = None
    assert main(["sample", str(tmp_path / "set")]) == 0


def test_the_sample_never_goes_where_something_else_is(renderer, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["sample", str(tmp_path)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in error and renderer.calls == 0
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_no_or_unknown_data_set(capsys):
    for arguments in ([], ["mvtek"]):
        assert main(arguments) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert "--help" in error
