"""The README's commands on a bare machine, with the seconds and the disk that each stage takes.

A root folder gets Debian's minimal base in the release that runs here, git and Python, what the
README asks for beside them, and a clone of the last commit; then `make demo` and `make test` run in
it. Each stage has mounts and processes of its own, which end with it, and the folder is removed at
the end whatever happens. Nothing of this machine is visible inside but how it reaches the
network: sources, proxies and certificates of apt and pip, and the folders pip is told to look into.

Needs root, a Debian and about 5 GB; more where the package index gives PyTorch with the libraries
of a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402

PACKAGES = ("git", "python3", "make", "ca-certificates")
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
STAGES = {
    "git, Python, make": f"apt-get update -qq && {INSTALL} {' '.join(PACKAGES)}",
    "clone": "git -c advice.detachedHead=false clone -q /moshi-c.bundle moshi-c",
    "make demo": "cd moshi-c && make demo",
    "make test": "cd moshi-c && make test",
}
# How the network is reached: proxies, certificates, pip's settings.
PASSED_ON = re.compile(r"(?i)(\w+_proxy|PIP_\w+|(SSL|REQUESTS|CURL)_\w*(CERT|CA)\w*)")
PIP_FILES = (".config/pip/pip.conf", ".pip/pip.conf")
CERTIFICATES = Path("usr/local/share/ca-certificates")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def release() -> str:
    """The code name of this Debian."""
    text = Path("/etc/os-release").read_text()
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if facts.get("ID") != "debian" or "VERSION_CODENAME" not in facts:
        raise SystemExit(f"this system is {facts.get('PRETTY_NAME')}, expected a Debian release")
    return facts["VERSION_CODENAME"].strip('"')


def sources(codename: str) -> list[tuple[str, str]]:
    """The addresses apt has Debian's main packages from, and which part: the release itself first,
    then its updates."""
    form = "$(ORIGIN)|$(CREATED_BY)|$(COMPONENT)|$(REPO_URI)|$(RELEASE)"
    found = []
    for line in output_of("apt-get", "indextargets", "--format", form).splitlines():
        origin, kind, component, address, part = line.split("|")
        if (origin, kind, component) == ("Debian", "Packages", "main"):
            found.append((address, part))
    found = [one for one in dict.fromkeys(found) if one[1].split("-")[0] == codename]
    found.sort(key=lambda one: one[1] != codename)
    if not found or found[0][1] != codename:
        raise SystemExit(f"apt has no source of {codename} here; expected one (apt-get update?)")
    return found


class Room:
    """A folder that holds a whole system, and commands inside it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.stages: dict[str, dict[str, float]] = {}
        self.mounts: dict[Path, Path] = {}
        self.environment: dict[str, str] = {}

    def run(self, name: str, *command: str) -> list[str]:
        """A stage: its output is shown as it comes, its seconds and disk are written down. Gives
        the last lines."""
        print(f"==== {name}", flush=True)
        before, began = self.megabytes(), time.monotonic()
        wrapped = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        lines: list[str] = []
        process = subprocess.Popen(
            [*wrapped, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                lines = [*lines[-19:], line.rstrip()]
            if process.wait() != 0:
                raise SystemExit(f"make fresh: '{name}' failed with status {process.returncode}")
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - began
        self.stages[name] = {
            "seconds": round(seconds, 1),
            "megabytes": round(self.megabytes() - before),
        }
        return lines

    def run_inside(self, name: str, command: str) -> list[str]:
        root = shlex.quote(str(self.root))
        mounts = [
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs -o ro sysfs {root}/sys",
            f"mkdir -p {root}/dev/pts {root}/dev/shm",
            f"mount -t devpts -o newinstance,ptmxmode=0666 devpts {root}/dev/pts",
            f"mount -t tmpfs tmpfs {root}/dev/shm",
        ]
        for source, target in self.mounts.items():
            where = shlex.quote(str(target))
            mounts.append(f"mkdir -p {where} && mount --bind {shlex.quote(str(source))} {where}")
            mounts.append(f"mount -o remount,bind,ro {where}")
        variables = {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self.environment}
        words = ["env", "-i", *(f"{key}={value}" for key, value in variables.items())]
        words += ["sh", "-ec", f"cd && {command}"]
        return self.run(
            name, "sh", "-ec", "\n".join([*mounts, f"exec chroot {root} {shlex.join(words)}"])
        )

    def megabytes(self) -> float:
        if not self.root.exists():
            return 0
        return int(output_of("du", "-sxk", str(self.root)).split()[0]) / 1024

    def build(self, addresses: list[tuple[str, str]]) -> None:
        mirror, codename = addresses[0]
        keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
        words = ["debootstrap", "--variant=minbase", f"--keyring={keys}", codename]
        command = shlex.join([*words, str(self.root), mirror])
        proxy = 'eval "$(apt-config shell http_proxy Acquire::http::Proxy)"; export http_proxy'
        self.run("debootstrap", "sh", "-c", f"{proxy}; exec {command}")
        lines = [f"deb {address} {part} main\n" for address, part in addresses]
        (self.root / "etc/apt/sources.list").write_text("".join(lines))
        settings = output_of("apt-config", "dump", "Acquire").splitlines(keepends=True)
        kept = [line for line in settings if not line.startswith("Acquire::IndexTargets")]
        (self.root / "etc/apt/apt.conf.d/90network").write_text("".join(kept))

    def reach_the_network(self) -> None:
        """What this machine needs for it, found where this machine keeps it."""
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", self.root / "etc" / name)
        if (Path("/") / CERTIFICATES).is_dir():
            shutil.copytree(Path("/") / CERTIFICATES, self.root / CERTIFICATES, dirs_exist_ok=True)
        self.environment = {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k)}
        texts = list(self.environment.values())
        settings = {Path("/etc/pip.conf"): Path("/etc/pip.conf")}
        settings |= {Path.home() / name: Path("/root") / name for name in PIP_FILES}
        for source, target in settings.items():
            if source.is_file():
                self.copy(source, target)
                texts.append(source.read_text())
        # Files and folders that these name. An index keeps its packages beside its pages, so that
        # the folder above comes along.
        for scheme, name in re.findall(r"(?:^|[\s=])(file://)?(/[^\s\"']+)", "\n".join(texts)):
            path = Path(name).parent if scheme else Path(name)
            target = self.root / path.relative_to("/")
            if path.is_file():
                self.copy(path, path)
            elif path.is_dir() and not target.exists():
                self.mounts[path] = target

    def copy(self, source: Path, target: Path) -> None:
        target = self.root / target.relative_to("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def table(self) -> str:
        rows = [
            ("stage", "seconds", "MB"),
            *(
                (name, f"{found['seconds']:.0f}", f"{found['megabytes']:.0f}")
                for name, found in self.stages.items()
            ),
        ]
        return "\n".join(f"{name:<24}{seconds:>9}{disk:>8}" for name, seconds, disk in rows)


def remove(folder: Path) -> None:
    """Removes the folder, however often somebody asks to stop. What is mounted in it would lose
    its contents."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if f" {folder}/" in Path("/proc/self/mounts").read_text():
        raise SystemExit(f"{folder} has something mounted in it; unmount that and remove it")
    print(f"==== removing {folder}", flush=True)
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where the root lies")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "fresh.json")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("make fresh needs root, since debootstrap, mount and chroot do")
    for number in SIGNALS:
        signal.signal(number, stop)

    commit = common.commit()
    folder = Path(tempfile.mkdtemp(prefix="moshi-c-fresh-", dir=options.folder))
    try:
        codename = release()
        room = Room(folder)
        room.build(sources(codename))
        room.reach_the_network()
        bundle = str(room.root / "moshi-c.bundle")
        subprocess.run(["git", "bundle", "create", "-q", bundle, "HEAD"], cwd=ROOT, check=True)
        said = {}
        for name, command in STAGES.items():
            said[name] = room.run_inside(name, command)
    except KeyboardInterrupt:
        raise SystemExit("make fresh: stopped") from None
    finally:
        remove(folder)
    print(room.table())
    result = {
        "commit": commit,
        "release": codename,
        "packages": list(PACKAGES),
        "stages": room.stages,
        "total": {
            key: round(sum(stage[key] for stage in room.stages.values()), 1)
            for key in ("seconds", "megabytes")
        },
        "tests": said["make test"][-1],
    }
    common.report("fresh", options.out, result)


if __name__ == "__main__":
    main()
