"""What the tests of published clients have in common: a server that asks for a key."""

from __future__ import annotations

import callers

KEY = "open sesame"
PATIENT = {**callers.PATIENT, "token": KEY}
