"""What setup.cfg cannot say: a wheel holds what is here, and nothing of what an older build has left in build/."""

import shutil

from setuptools import setup
from setuptools.command.build import build


class FreshBuild(build):
    """Builds from nothing."""

    def run(self) -> None:
        """Remove what was built before, and build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build": FreshBuild})
