"""scripts/install.py: uv in place of pip."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.python


def test_uv_is_told_of_the_registries_that_pip_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import install

    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://one.example/simple\nfind-links = /one\ntimeout = 60\n"
        "extra-index-url = https://two.example/simple\n    file:///three\n"
        "[install]\nno-index = false\n"
    )
    for setting in ("INDEX_URL", "EXTRA_INDEX_URL", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{setting}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/four /five")
    found = install.registries()
    found.pop("SSL_CERT_FILE", None)  # of this machine
    assert found == {
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example/simple file:///three",
        "UV_FIND_LINKS": "/four,/five",
        "UV_NO_INDEX": "false",
    }
