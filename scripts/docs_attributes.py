"""An extension of griffe, which reads docstrings for the site: fields that a class explains as
`name: what it is` become a list of attributes."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(\w+(?:, \w+)*): ")


class FieldsOfClasses(griffe.Extension):
    """Puts `Attributes:` in front of such lines, for fields that the class has."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring is None:
            return
        lines, out, inside = cls.docstring.value.splitlines(), [], False
        for line in lines:
            match = _FIELD.match(line)
            if match and all(name in cls.members for name in match[1].split(", ")):
                if not inside:
                    out += ["", "Attributes:"]
                inside = True
                text = line[match.end() :]
                out += [f"    {name}: {text}" for name in match[1].split(", ")]
            elif inside and line.startswith(" "):
                out.append(f"    {line}")
            else:
                inside = False
                out.append(line)
        cls.docstring.value = "\n".join(out)
