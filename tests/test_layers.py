"""The arrows of the architecture point downward: includes in csrc/, imports in moshi_c/.

Also what the C library promises everywhere: no device or instruction set in model files, no
printing, no exit, no abort.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.python

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "moshi_c"

# From the bottom upward. A file includes headers of the rows above its own (and its own header);
# a folder is one row, whose files may include each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("moshi",),
    ("hash", "status"),
    ("ogg_opus",),
    ("os",),
    ("json", "quant"),
    ("config", "safetensors"),
    ("backend",),
    ("cpu/", "cuda", "trace", "state", "weights"),
    ("snapshot", "transformer"),
    ("depth",),
    ("lm", "mimi"),
    ("model", "refresh"),
    ("convert", "engine"),
    ("codec", "prefill", "session"),
)
LEVEL = {name: level for level, row in enumerate(LEVELS) for name in row}

# Of the Python package only the top has a fixed order; below it any order without circles will do.
IMPORTED_BY = {"__init__": {"cli", "__main__"}, "cli": {"__main__"}, "__main__": set()}

C_FILES = sorted(path for pattern in ("*.[ch]", "*/*.[ch]") for path in CSRC.glob(pattern))
CORE_FILES = [path for path in C_FILES if path.parent.name != "py"]
MODEL_FILES = [path for path in CORE_FILES if path.parent == CSRC and path.stem != "os"]
PYTHON_FILES = sorted(PACKAGE.glob("*.py"))
MODULES = {path.stem for path in PYTHON_FILES} | {"_core"}

DEVICE_MACRO = re.compile(
    r"^[ \t]*#[ \t]*(?:el)?if(?:n?def)?\b.*"
    r"(?:__AVX|__SSE|__FMA|__F16C|__AMX|__ARM|__aarch64|__x86_64|__i386|__CUDA|__NEON|__riscv"
    r"|MOSHI_CUDA|MOSHI_ISA)",
    re.MULTILINE,
)
# Words that end the process or write to its streams.
FORBIDDEN = re.compile(
    r"\b(?:v?printf|puts|putchar|perror|exit|_exit|quick_exit|abort)\s*\(|\bstd(?:out|err)\b"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> str:
    """The text without comments and without what stands in quotes, lines kept."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, blank, path.read_text(), flags=re.DOTALL)


def includes_of(path: Path) -> list[Path]:
    names = re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', path.read_text(), re.MULTILINE)
    return [(path.parent / name).resolve() for name in names]


def layer_of(path: Path) -> str:
    folder = path.parent.relative_to(CSRC)
    return path.stem if folder == Path() else f"{folder.parts[0]}/"


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_includes_point_downward(path: Path) -> None:
    layer = layer_of(path)
    assert layer in LEVEL, f"{name_of(path)} has no row in LEVELS of {Path(__file__).name}"
    for header in includes_of(path):
        assert header.is_file(), f"{name_of(path)} includes {header}, which is not there"
        other = layer_of(header)
        assert other == layer or LEVEL[other] < LEVEL[layer], (
            f"{name_of(path)} includes {name_of(header)}, which is not below it"
        )


@pytest.mark.parametrize(
    "path", [path for path in C_FILES if path.parent.name == "py"], ids=name_of
)
def test_the_binding_knows_only_the_public_header(path: Path) -> None:
    for header in includes_of(path):
        assert header.parent == path.parent or header == CSRC / "moshi.h", name_of(header)


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_only_the_binding_knows_python(path: Path) -> None:
    assert not re.search(r"#\s*include\s*[<\"](?:Python|numpy/|structmember)", path.read_text())


@pytest.mark.parametrize("path", MODEL_FILES, ids=name_of)
def test_model_files_name_no_device_or_instruction_set(path: Path) -> None:
    assert not DEVICE_MACRO.search(code_of(path))
    assert "intrin.h" not in path.read_text()
    assert "arm_neon" not in path.read_text()


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_the_library_never_prints_or_ends_the_process(path: Path) -> None:
    found = [
        f"line {number}: {match[0]}"
        for number, line in enumerate(code_of(path).splitlines(), 1)
        for match in FORBIDDEN.finditer(line)
    ]
    assert not found


@pytest.fixture(scope="module")
def words() -> dict[Path, Counter[str]]:
    """How often each file in C or for a card says a word, comments and quotes left out."""
    folders = ("csrc", "csrc/cpu", "csrc/py", "cuda", "tests/c", "tests/cuda", "tests/fuzz")
    paths = [
        path
        for folder in (*folders, "benchmarks", "examples")
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".c", ".h", ".inc", ".cu", ".cpp", ".cuh")
    ]
    return {path: Counter(re.findall(r"\w+", code_of(path))) for path in paths}


@pytest.mark.parametrize(
    "path", [path for path in C_FILES if path.suffix == ".h" and path.stem != "moshi"], ids=name_of
)
def test_a_header_declares_what_other_files_use(
    path: Path, words: dict[Path, Counter[str]]
) -> None:
    """One file has the function, another one calls it; those inline are in the header itself."""
    declared = re.findall(
        r"^(?!typedef)(static inline )?[a-z][\w *]*?\b(\w+)\(", code_of(path), re.MULTILINE
    )
    for inline, name in declared:
        where = [other for other in words if other != path and words[other][name]]
        if inline:
            assert where or words[path][name] > 1, f"nobody uses {name}"
        else:
            assert len(where) > 1, f"{name} is for one file alone"


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a module needs to run (what types alone need is left out)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {alias.name for alias in node.names}
            if node.level == 1 or module == "moshi_c":
                inside = module.removeprefix("moshi_c") if node.level == 0 else module
                found.update({inside.split(".")[0]} if inside else modules_among(names))
            elif module.startswith("moshi_c."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "moshi_c":
                    found.add("__init__")
                elif alias.name.startswith("moshi_c."):
                    found.add(alias.name.split(".")[1])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {path.stem}


def modules_among(names: set[str]) -> set[str]:
    """`from . import x`: x is a module, or a name of the package itself."""
    return (names & MODULES) | ({"__init__"} if names - MODULES else set())


def test_the_command_line_is_on_top() -> None:
    for path in PYTHON_FILES:
        for other in imports_of(path) & IMPORTED_BY.keys():
            assert path.stem in IMPORTED_BY[other], f"{name_of(path)} imports {other}"


def test_only_the_command_line_knows_the_server() -> None:
    for path in PYTHON_FILES:
        if path.stem not in ("cli", "__main__"):
            assert "server" not in imports_of(path), name_of(path)
    for path in PACKAGE.glob("server/*.py"):
        text = path.read_text()
        assert not re.search(r"from \.\.(?:cli|server)\b|from \.\. import (?!__version__)", text)


def test_imports_have_no_circles() -> None:
    left = {path.stem: imports_of(path) & MODULES for path in PYTHON_FILES}
    left["_core"] = {"errors"}
    while left:
        bottom = {name for name, needs in left.items() if not needs & left.keys()}
        assert bottom, f"these import each other: {sorted(left)}"
        for name in bottom:
            del left[name]


def test_every_kernel_waits_for_earlier_ones_first() -> None:
    kernels = 0
    for path in (ROOT / "cuda").iterdir():
        if path.name.startswith("host_shim"):
            continue
        text = path.read_text()
        bodies = re.findall(r"^__global__ [^{;]*\{\n(.*)", text, re.MULTILINE)
        assert len(bodies) == text.count("__global__"), path.name
        for first in bodies:
            assert first.strip() == "after_earlier_kernels();", f"{path.name}: {first}"
        kernels += len(bodies)
    assert kernels > 10


def test_there_is_something_to_look_at() -> None:
    assert len(CORE_FILES) > 20
    assert len(PYTHON_FILES) > 5
