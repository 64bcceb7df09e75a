#!/usr/bin/env bash
# numpy 2.4.6 (with scikit-learn 1.9.1): members of an enumeration with the type str become the beginnings of
# their names, without an error. The array is made as wide as the members' values, and then filled with
# str() of each, which is "Class.NAME" for `class Class(str, Enum)`, and cut. Labels "a", "b" and "c" of a
# class named Label all become "L": scikit-learn's LabelEncoder sees one class. Members of enum.StrEnum, whose
# str() is the value, are kept.
#
# Seen with Python 3.11:
#   str, Enum: ['L' 'L' 'L'], classes ['L']
#   StrEnum: ['a' 'b' 'c'], classes ['a' 'b' 'c']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 scikit-learn==1.9.1
cat > "$folder/run.py" <<'PYTHON'
import enum

import numpy as np
from sklearn.preprocessing import LabelEncoder


class Label(str, enum.Enum):
    A = "a"
    B = "b"
    C = "c"


class Other(enum.StrEnum):
    A = "a"
    B = "b"
    C = "c"


assert Label.A == "a" and [*Label] == ["a", "b", "c"]
found = []
for name, members in (("str, Enum", [*Label]), ("StrEnum", [*Other])):
    array, classes = np.array(members), LabelEncoder().fit(members).classes_
    print(f"{name}: {array}, classes {classes}")
    found.append((array.tolist(), classes.tolist()))
assert found == [(["L"] * 3, ["L"]), (["a", "b", "c"], ["a", "b", "c"])], found
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
