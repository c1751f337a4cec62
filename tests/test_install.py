"""scripts/install.py: uv in place of pip."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.python


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import install

    return install


#: What pip is told, in its environment; of its files none counts, whatever this machine has.
TOLD = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "https://one.example/simple",
    "PIP_EXTRA_INDEX_URL": "https://two.example/simple file:///three",
    "PIP_FIND_LINKS": "/four /five",
    "PIP_NO_INDEX": "false",
    "PIP_CERT": "/six.pem",
    "PIP_TRUSTED_HOST": "one.example two.example:8080",
    "PIP_TIMEOUT": "60",
}


def test_uv_is_told_of_the_registries_that_pip_knows(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    assert install.registries() == {
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example/simple file:///three",
        "UV_FIND_LINKS": "/four,/five",
        "UV_NO_INDEX": "false",
        "SSL_CERT_FILE": "/six.pem",
        "UV_INSECURE_HOST": "one.example two.example:8080",
    }


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("global.index-url='https://one.example'\n", "https://one.example"),
        ("install.index-url='one\\ntwo'\n", "one two"),  # as a file has them, a line for each
        ("install.index-url='two'\nglobal.index-url='one'\n", "two"),
        (":env:.index-url='three'\nglobal.index-url='one'\ninstall.index-url='two'\n", "three"),
        ("download.index-url='four'\nglobal.timeout='60'\n", None),
        ("", None),
    ],
)
def test_what_counts_for_pips_install_counts_for_uv(
    install: ModuleType, listed: str, found: str | None
) -> None:
    assert install.uv_settings(listed) == ({"UV_DEFAULT_INDEX": found} if found else {})
