"""One build step beside pyproject.toml: the wheel carries sample_volumes/ as med_gradcam/_samples.

`med-gradcam demo` must run after a plain `pip install`, so the small volumes and nets travel with
the package. They stay outside it in the repository, next to the scripts that make them; an editable
install and a checkout read them from there, so nothing is copied into the source tree.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path("sample_volumes")
CARRIED = Path("med_gradcam", "_samples")


def is_data(path: Path) -> bool:
    """Everything but the scripts that make the samples, hidden files and caches."""
    return (
        path.is_file()
        and path.suffix != ".py"
        and not any(part.startswith((".", "__")) for part in path.parts)
    )


class BuildWithSamples(build_py):
    """The usual build of the packages, then the sample files beside them."""

    def run(self) -> None:
        """Copy the packages, and the samples unless the install is editable."""
        super().run()
        for target, source in self._samples().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: FBT001, FBT002 - setuptools' signature
        """List what the build writes, samples included."""
        return [*super().get_outputs(include_bytecode), *self._samples()]

    def get_source_files(self) -> list[str]:
        """List what the source distribution needs, samples included."""
        return [*super().get_source_files(), *self._samples().values()]

    def _samples(self) -> dict[str, str]:
        """Where each sample goes: {path in the wheel's build folder: path in the repository}."""
        if self.editable_mode:
            return {}
        files = sorted(filter(is_data, SOURCE.rglob("*")))
        return {
            str(Path(self.build_lib) / CARRIED / path.relative_to(SOURCE)): str(path)
            for path in files
        }


setup(cmdclass={"build_py": BuildWithSamples})
