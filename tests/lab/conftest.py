"""The lab's fixtures: one guest for all tests, and a volume group of its own for each."""

from collections.abc import Iterator

import pytest

from tests.conftest import require
from tests.lab import image, shop
from tests.lab.guest import Guest
from tests.lab.shop import Shop
from tests.lab.volumes import VolumeGroup

DISKS = (4 << 30,) * 3


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the image before the first test: that takes minutes, more than a test may."""
    if session.config.option.collectonly or not any("guest" in _fixtures(item) for item in session.items):
        return
    if image.missing() is None:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        try:
            with capture.global_and_fixture_disabled():
                image.image()
        except image.BuildError:
            pass  # the fixture tries again and says why


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bear with the guest: it is slow, and in `make test` another one is beside it."""
    for item in items:
        if "guest" in _fixtures(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """A booted guest with three empty data disks, the same for every test."""
    lack = image.missing()
    require(lack is None, str(lack))
    with Guest(image.image(), DISKS) as guest:
        yield guest


@pytest.fixture
def volume_group(guest: Guest) -> Iterator[VolumeGroup]:
    """A volume group on the guest's first data disk; gone after the test, with all that is in it."""
    with VolumeGroup(guest, guest.devices[0]) as group:
        yield group


@pytest.fixture(scope="module")
def open_shop(guest: Guest) -> Iterator[Shop]:
    """A database on a volume of the second data disk, the same for every test of a file."""
    with shop.opened(guest, guest.devices[1]) as opened:
        yield opened
