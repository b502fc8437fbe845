"""The list of a large folder's images: kept, used again, and never when it is no longer true."""

import os
from pathlib import Path

import pytest

from ssl_ib.data import listing
from ssl_ib.data.sources.folder import Folder

BEFORE = 1_600_000_000


def touched(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def settle(*folders: Path) -> None:
    """As if they had been changed long ago."""
    for folder in folders:
        os.utime(folder, (BEFORE, BEFORE))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/{0,1}.png, a/b/2.png, a link to a folder elsewhere with 3.png, one to the root, and one to nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "WORTH_KEEPING", 4)
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for name in ("a/0.png", "a/1.png", "a/b/2.png", "notes.txt"):
        touched(root / name)
    touched(elsewhere / "3.png")
    (root / "link").symlink_to(elsewhere)
    (root / "above").symlink_to(root)
    (root / "later").symlink_to(tmp_path / "later")
    settle(root, root / "a", root / "a" / "b", elsewhere)
    return root


NAMES = ["a/0.png", "a/1.png", "a/b/2.png", "link/3.png"]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were listed, and not taken from a list that was kept."""
    found: list[Path] = []
    original = listing.image_files
    monkeypatch.setattr(listing, "image_files", lambda root, visited: found.append(root) or original(root, visited))
    return found


def test_a_list_is_made_once(root: Path, listed: list[Path], tmp_path: Path) -> None:
    assert listing.list_images(root) == NAMES and listing.list_images(root) == NAMES and len(listed) == 1
    assert not list(root.rglob("*.safetensors")) and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    # What is in a file is not part of it, and neither is the way to the folder.
    (root / "a" / "0.png").write_bytes(b"more")
    (tmp_path / "other").symlink_to(root)
    assert listing.list_images(tmp_path / "other") == NAMES and len(listed) == 1
    source = Folder(str(root))
    assert len(listed) == 1 and source.files()[0].names == NAMES


def added(root: Path) -> None:
    touched(root / "a" / "b" / "9.png")


def removed(root: Path) -> None:
    (root / "a" / "0.png").unlink()


def renamed(root: Path) -> None:
    (root / "a" / "b").rename(root / "a" / "c")


def changed_behind_a_link(root: Path) -> None:
    touched(root.parent / "elsewhere" / "9.png")


def other_folder_in_its_place(root: Path) -> None:
    touched(root.parent / "new" / "8.png")
    (root.parent / "elsewhere").rename(root.parent / "old")
    (root.parent / "new").rename(root.parent / "elsewhere")
    settle(root.parent / "elsewhere")


def a_link_that_leads_somewhere_now(root: Path) -> None:
    touched(root.parent / "later" / "7.png")


@pytest.mark.parametrize(
    "change",
    [added, removed, renamed, changed_behind_a_link, other_folder_in_its_place, a_link_that_leads_somewhere_now],
)
def test_a_list_is_made_again_where_a_folder_has_changed(root: Path, listed: list[Path], change) -> None:
    listing.list_images(root)
    change(root)
    found = listing.list_images(root)
    assert len(listed) == 2 and found != NAMES
    assert found == sorted(str(path.relative_to(root)) for path in _walk(root) if path.suffix == ".png")


def _walk(root: Path) -> list[Path]:
    walks = (os.walk(start) for start in (root, root / "link", root / "later"))
    return [Path(folder) / name for walk in walks for folder, _, names in walk for name in names]


def test_a_folder_that_is_being_filled_is_listed_anew(root: Path, listed: list[Path], tmp_path: Path) -> None:
    """A change within the tick of the file system's clock would leave no trace."""
    touched(root / "a" / "4.png")
    for _ in range(2):
        assert len(listing.list_images(root)) == 5
    assert len(listed) == 2 and not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_damaged_list_is_made_again_and_a_small_one_is_not_kept(
    root: Path, listed: list[Path], tmp_path: Path
) -> None:
    listing.list_images(root)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-3])
    assert listing.list_images(root) == NAMES and len(listed) == 2
    listing.list_images(root / "a")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_is_done_without(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert listing.list_images(root) == NAMES
