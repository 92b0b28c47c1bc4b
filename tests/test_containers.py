"""The recipes of containers: their files exist, are the same in both, and their step installs a working program."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
DEFINITION = (ROOT / "containers" / "mvhpc.def").read_text()


def copied() -> list[str]:
    """What the Dockerfile copies from the repository, relative to its root."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()[:-1]]


def test_both_recipes_copy_the_same_files_which_exist_and_are_sent_to_docker() -> None:
    files = re.search(r"%files\n((?: {4}.+\n)+)", DEFINITION)
    assert files
    pairs = [line.split() for line in files[1].splitlines()]
    assert sorted(source for source, _ in pairs) == sorted(copied())
    assert all(target == f"/opt/mvhpc/{source}" for source, target in pairs)
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists() and source.partition("/")[0] in sent, source
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == re.findall(r"^From: (\S+)", DEFINITION, re.M)


@pytest.mark.slow
def test_the_step_of_the_recipes_installs_a_working_program(tmp_path: Path) -> None:
    """The recipes' own script, on a copy of what they copy; packages that this environment has are not fetched."""
    (step,) = re.findall(r"^RUN EXTRAS=\$EXTRAS (\S+)$", DOCKERFILE, re.M)
    assert f"/opt/mvhpc/{step}\n" in DEFINITION
    for source in copied():
        target = tmp_path / "opt" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
        copy(ROOT / source, target, **({"symlinks": True} if (ROOT / source).is_dir() else {}))
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    binaries = environment / "bin"
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PATH": f"{binaries}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "EXTRAS": re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)[0],
    }
    done = subprocess.run([tmp_path / "opt" / step], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (entry,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', DOCKERFILE, re.M)
    assert f"exec {entry} " in DEFINITION
    code = "import mvhpc, shards.presets as p; print(mvhpc.__file__, p.load_preset('pack', 'small')['spacing'])"
    for command in ([binaries / entry, "--help"], [binaries / "python", "-c", code]):
        done = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(packages / "mvhpc" / "__init__.py"), "4.0"]
    assert sys.prefix != str(environment)
