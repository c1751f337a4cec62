"""The stages for a machine with a card, as far as they can be tried without one: what they say of
what is missing, the table, and the models that they make. `make cuda-host` runs them whole, dry."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moshi_c import load

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROOT / "benchmarks" / "gpu.sh"
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_models = importlib.import_module("gpu_models")
gpu_profile = importlib.import_module("gpu_profile")
gpu_report = importlib.import_module("gpu_report")


def run(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"OUT": str(out), "PYTHON": sys.executable, "MODEL": str(out / "none")} | environment
    return subprocess.run(
        [str(STAGES), *words], env=os.environ | given, capture_output=True, text=True, timeout=120
    )


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())


def test_a_stage_that_cannot_run_says_why_and_the_next_one_follows(tmp_path: Path) -> None:
    done = run(tmp_path, "frames", "nonsense")
    assert done.returncode == 1
    lines = written(tmp_path)["lines"][1:]
    troubles = {line["of"]: line["trouble"] for line in lines}
    assert "there is no model at" in troubles["frames"] and "`model`" in troubles["frames"]
    assert "there is no stage nonsense" in troubles["nonsense"]
    assert done.stdout.splitlines()[-2:] == [
        f"frames: 0 s, {troubles['frames']}",
        f"nonsense: 0 s, {troubles['nonsense']}",
    ]


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    before = {"name": "codec 1", "variant": "", "p50_ms": 0.3, "p99_ms": 0.4}
    gpu_report.main([str(tmp_path), "begin"])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(json.dumps(before) + '\n{"name": "codec 64", "p5')
    gpu_report.main([str(tmp_path), "stage", "codec", "7", "ended after 480 s"])
    gpu_report.main([str(tmp_path)])
    found = written(tmp_path)
    assert found["lines"][1] == before
    assert found["lines"][-1]["trouble"] == "ended after 480 s"
    assert {"machine", "date", "commit"} <= set(found)


def test_the_table_tells_what_was_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(name: str, **fields: Any) -> str:
        return json.dumps({"name": name, "variant": ""} | fields) + "\n"

    (tmp_path / "results.jsonl").write_text(
        line("call", machine={}, date="", commit="", dry=False)
        + line("frame bf16+bf16", p50_ms=4.6, p99_ms=5, bytes_ms=3.8)
        + line("frame bf16+bf16", p50_ms=4.4, p99_ms=5, bytes_ms=3.8, variant="X=1")
        + line("product 4096 x 4096", p50_ms=0.01, share=0.91, ratio=1.2)
        + line("prefill", p50_ms=20, ratio=60, tflops=300, verified=False)
        + line("matrices", tflops=750)
        + line("64 sessions bf16+bf16", p50_ms=30, p99_ms=31, bytes_ms=26.8)
        + line("64 sessions bf16+bf16, paced", p50_ms=33, p99_ms=45, late=0)
    )
    gpu_report.main([str(tmp_path)])
    rows = {(row["name"], row["key"], row["variant"]): row for row in written(tmp_path)["targets"]}
    plain, other = (rows["frame bf16+bf16", "p50_ms", variant] for variant in ("", "X=1"))
    assert plain["passed"] and not plain["stretch"]
    assert plain["floor_ms"] == pytest.approx(4.3)
    assert plain["share_of_floor"] == pytest.approx(4.3 / 4.6, abs=1e-3)
    assert other["passed"] and other["stretch"]
    assert not rows["product 4096 x 4096", "share", ""]["passed"]
    assert rows["product 4096 x 4096", "ratio", ""]["passed"]
    paced = "64 sessions bf16+bf16, paced"
    assert rows[paced, "late", ""]["passed"]
    assert not rows[paced, "p99_over_p50", ""]["passed"]  # 1.36
    assert rows[paced, "over_back_to_back", ""]["passed"]  # 1.1
    assert rows["codec 1", "p50_ms", ""]["found"] is None
    assert rows["prefill", "p50_ms", ""]["passed"] and not rows["prefill", "p50_ms", ""]["verified"]
    given = [line for line in written(tmp_path)["lines"] if line["name"] == "prefill"]
    assert given[0]["share_of_matrices"] == 0.4
    told = [
        text for text in capsys.readouterr().out.splitlines() if "not the CPU's results" in text
    ]
    assert len(told) == 2 and all("prefill" in text for text in told)


def made() -> set[str]:
    """Names of the lines that the stages ask the programs for."""
    text = STAGES.read_text().partition("    dry)")[0]
    names = {f"product {a} x {b}" for a, b in _products()}
    kinds = {"bf16": "bf16+bf16", "int8": "int8+int8", "q4": "q4+int8"}
    for words in re.findall(
        r'^ +(?:VARIANTS="" )?part (?:-|"\$\w+") "\$RESULTS" (.*)$', text, re.MULTILINE
    ):
        stage, *rest = words.split()
        if stage == "frames":
            names |= {f"frame {kinds[rest[0]]}", f"depth {kinds[rest[0]]}"}
        elif stage == "many":
            name = f"{rest[1]} sessions {kinds[rest[0]]}"
            paced = {f"{name}, beginning", f"{name}, paced"}
            names |= {name} | (paced if len(rest) > 2 else set())
        elif stage == "streams":
            names.add(f"streams {kinds[rest[0]]}")
        else:
            names.add(" ".join([stage, *rest]))
    upstream = (ROOT / "benchmarks" / "gpu_upstream.py").read_text()
    names |= {f"upstream {name}" for name in re.findall(r'beside\("(\w+)"', upstream)}
    names |= {f"upstream codec {n}" for n in re.findall(r"codec\((\d+)\)", upstream)}
    return names | {f"upstream {n} sessions" for n in re.findall(r"many\((\d+)\)", upstream)}


def _products() -> list[tuple[str, str]]:
    source = (ROOT / "benchmarks" / "gpu.c").read_text()
    return re.findall(r"measure_product\(backend, (\d+), (\d+)\)", source)


def test_every_target_is_measured_by_a_stage() -> None:
    assert {target.name for target in gpu_report.TARGETS} <= made()
    assert {target.id for target in gpu_report.TARGETS} == {f"G{i}" for i in range(1, 11)}


def test_kernels_are_read_from_the_profilers_table() -> None:
    head = (
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    )
    name = "void k_product<(format)2, 1, End>(product<End>)"
    rows = [
        f'"{i}","7","{name}","Command line profiler metrics","{metric}","x","{value}"'
        for i in range(2)
        for metric, value in ((gpu_profile.TIME, "2,000"), (gpu_profile.BYTES, "8,000,000"))
    ]
    found = gpu_profile.kernels("\n".join(["==PROF== Connected", head, *rows]))
    assert found == {"k_product<(format)2, 1, End>": [(pytest.approx(2e-6), 8e6)] * 2}
    assert gpu_profile.kernels("==ERROR== no device") == {}


@pytest.mark.parametrize("kind", ["7b", "stt"])
def test_narrow_models_of_the_stages_open(tmp_path: Path, kind: str) -> None:
    gpu_models.main([str(tmp_path), kind, "dry"])
    with load(tmp_path, device="cpu", progress=False) as model:
        assert model.family == ("moshi" if kind == "7b" else "stt")


def test_the_large_models_have_the_published_sizes() -> None:
    def count(shapes: dict[str, list[int]]) -> int:
        total = 0
        for shape in shapes.values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total

    assert count(gpu_models.language(gpu_models.MODELS["7b"])) == 7_687_729_152
    assert round(count(gpu_models.language(gpu_models.MODELS["stt"])) / 1e6) == 989
