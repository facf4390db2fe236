"""What `pip install` brings: the wheel and the source distribution, built once, looked into, and used in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from prune_opd_hf import __version__

ROOT = Path(__file__).parents[1]
LARGEST = 3_000_000
NOT_COPIED = (
    ".git",
    ".venv*",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "runs",
    "site",
    "results",
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """`python -m build` of a copy of the project: the source distribution, and the wheel made of it."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"prune_opd_hf-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """Runs a program of a fresh environment in another folder. The wheel is installed there; its dependencies are those of the
    tests' environment, whose own copy of the package is not seen: no .pth file is read in a folder that one has named."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    bin_folder = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    paths = sysconfig.get_paths(vars=dict.fromkeys(("base", "platbase"), str(folder / "env")))
    installed = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    Path(paths["purelib"], "dependencies.pth").write_text(installed)
    install = f"-m pip --python {bin_folder / 'python'} install --quiet --no-deps --no-index {wheel}".split()
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()

    def run(program, *arguments):
        command = [bin_folder / program, *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    package = ROOT / "prune_opd_hf"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    described = {name for name in names if name.startswith(f"prune_opd_hf-{__version__}.dist-info/")}
    assert names - described == expected
    assert any(name.endswith("licenses/LICENSE") for name in described)


def test_the_source_distribution_has_neither_tests_nor_results_nor_documentation(dist):
    with tarfile.open(dist / f"prune_opd_hf-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names if "/" in name} == {"prune_opd_hf", "prune_opd_hf.egg-info"}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= names


def test_both_are_small(dist):
    assert [path.name for path in dist.iterdir() if path.stat().st_size >= LARGEST] == []


def test_it_is_imported_from_where_it_was_installed(outside):
    code = "import prune_opd_hf as p; print(p.__version__, p.__file__)"
    number, place = outside("python", "-c", code).split()
    assert number == __version__
    assert "site-packages" in place
    assert not Path(place).is_relative_to(ROOT)


def test_the_command_describes_its_environment(outside):
    assert outside("prune-opd", "env").splitlines()[0].split() == ["prune-opd-hf", __version__]


def test_the_demo_trains_evaluates_and_saves_a_student_that_plain_transformers_loads(outside):
    outside("prune-opd", "demo", "--seconds", "1", "--evaluation_problems", "16", "--output_dir", "demo")
    load = (
        "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('demo/student').num_parameters())"
    )
    assert int(outside("python", "-c", load).split()[-1]) > 0
    evaluate = (
        "evaluate demo/student --benchmarks chain --limit 4 --num_generations 1 --max_completion_length 32 --quiet"
    )
    assert outside("prune-opd", *evaluate.split()).startswith("|")


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    assert {str(citation["version"]), newest} == {__version__}
    assert "Prune-OPD" in citation["preferred-citation"]["title"]
