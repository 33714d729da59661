"""What setup.cfg cannot say: a wheel holds what is here and its man pages, and nothing that an older build has left."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build


class FreshBuild(build):
    """Builds from nothing, and makes the man pages of what is here."""

    def run(self) -> None:
        """Remove what was built before, and build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        sys.path.insert(0, str(Path(__file__).parent.absolute()))
        import manpages

        pages = Path(self.build_base, "man")
        pages.mkdir(parents=True, exist_ok=True)
        self.distribution.data_files = [("share/man/man1", manpages.write(str(pages)))]


setup(cmdclass={"build": FreshBuild})
