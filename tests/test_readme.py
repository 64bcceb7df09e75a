"""The README's code, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.paths import REPOSITORY

README = REPOSITORY / "README.md"


def test_the_readme_code_runs_in_its_order_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    printed = re.search(r"prints `(.*?)`", text)
    assert len(blocks) == 3
    assert printed is not None
    # Another of the README's blocks trains these, from data that nobody has here.
    customers = (
        "import shutil\n"
        'for name in ("customer-a", "customer-b"):\n'
        '    shutil.copytree("my-adapter", f"adapters/{name}")\n'
    )
    program = "\n".join([*blocks[:2], customers, blocks[2]])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, generated = done.stdout.split("\n", 1)
    assert first == printed[1]
    assert generated.startswith("tensor(")
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_readme_task_file_is_one_that_fit_many_reads(tmp_path: Path) -> None:
    manifest = re.search(r"```yaml\n(.*?)```", README.read_text("utf-8"), re.S)
    assert manifest is not None
    assert "steps: 50" in manifest[1]
    (tmp_path / "tasks.yaml").write_text(manifest[1].replace("steps: 50", "steps: 1"), "utf-8")
    for customer in ("a", "b"):
        data = "text,label\nCharged twice.,bill\nNo parcel came.,post\n"
        (tmp_path / f"customer-{customer}.csv").write_text(data, "utf-8")
    command = [sys.executable, "-m", "ia3", "fit-many", "tasks.yaml", "--out", "adapters"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for customer in ("a", "b"):
        folder = tmp_path / "adapters" / f"customer-{customer}"
        assert (folder / "adapter_model.safetensors").is_file()
