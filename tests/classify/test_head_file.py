"""The file of a classifier's head: written, kept with its adapter, read or refused."""

import base64
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save
from support.heads import encoder_files, numbered_adapter, save_encoder, state
from torch import Tensor

from ia3 import IA3Config, IA3Model
from ia3.adapter.files import adapter_files, read_adapter, write_saved
from ia3.classify.head_file import check_head_size, head_bytes, read_head
from ia3.errors import BrokenFileError, IA3Error, MissingFileError
from ia3.files.atomic import write_files
from ia3.files.saved import LARGEST_HEAD, SavedFolder
from ia3.sentences.head import Head

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK, HEAD = "ia3_task.json", "ia3_head.safetensors"
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(3, 8, generator=GENERATOR), torch.tensor([0.5, -1e4, 0.0])


def with_head(folder: Path, content: bytes) -> str:
    """An adapter's folder that has this as the head's file; returns its SHA-256."""
    write_files(folder, {**encoder_files(1), HEAD: content})
    return hashlib.sha256(content).hexdigest()


def read(folder: Path, classes: int, digest: str | None) -> Head | None:
    with SavedFolder(folder) as saved:
        return read_head(saved, classes, digest)


# -- written and read ------------------------------------------------------------------------------


def test_a_head_is_written_as_the_package_writes_it_and_read_bit_for_bit(tmp_path: Path) -> None:
    content = head_bytes(WEIGHT, BIAS)
    assert content == save({"weight": WEIGHT, "bias": BIAS}, {"format": "pt"})
    found = read(tmp_path, 3, with_head(tmp_path, content))
    assert found is not None
    assert {found.weight.dtype, found.bias.dtype} == {torch.float32}
    assert torch.equal(found.weight, WEIGHT)
    assert torch.equal(found.bias, BIAS)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t.clone().requires_grad_(),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["float64", "a parameter", "not contiguous"],
)
def test_the_same_values_are_the_same_bytes(change: Callable[[Tensor], Tensor]) -> None:
    assert head_bytes(change(WEIGHT), change(BIAS)) == head_bytes(WEIGHT, BIAS)


def test_a_language_models_task_has_no_head(tmp_path: Path) -> None:
    with_head(tmp_path, head_bytes(WEIGHT, BIAS))
    assert read(tmp_path, 3, None) is None


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    write_saved(tmp_path, adapter_files(numbered_adapter(1)))
    with pytest.raises(MissingFileError, match=rf"no classifier in .*{HEAD} is not there"):
        read(tmp_path, 3, "0" * 64)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (WEIGHT[0], BIAS, r"weight is \[8\] and its bias \[3\], expected \[classes, dim\]"),
        (WEIGHT, BIAS[:2], r"weight is \[3, 8\] and its bias \[2\], expected"),
        (WEIGHT[:, :0], BIAS, r"weight is \[3, 0\]"),
        (WEIGHT / 0, BIAS, r"the head's weight is not finite \(24 of its 24 values.*diverged"),
        (WEIGHT, BIAS.double() * 1e300, r"the head's bias is not finite \(2 of its 3 values"),
        (torch.zeros(1250, 1024), torch.zeros(1250), r"1,250 classes on embeddings of 1,024"),
    ],
    ids=["a vector", "other classes", "no values", "infinite", "too large a value", "too large"],
)
def test_what_could_not_be_read_again_is_not_written(
    weight: Tensor, bias: Tensor, message: str
) -> None:
    with pytest.raises(IA3Error, match=message):
        head_bytes(weight, bias)


@pytest.mark.parametrize("dim", [1, 384, 1024])
def test_the_largest_head_is_saved_and_read_from_its_copy(tmp_path: Path, dim: int) -> None:
    with pytest.raises(IA3Error, match=r"expected at most [\d,]+ classes") as raised:
        check_head_size(10**9, dim)
    most = int(str(raised.value).split("at most ")[1].split()[0].replace(",", ""))
    check_head_size(most, dim)
    with pytest.raises(IA3Error):
        check_head_size(most + 1, dim)
    content = head_bytes(torch.ones(most, dim), torch.zeros(most))
    assert LARGEST_HEAD - 4 * (dim + 1) - 1000 < len(content) <= LARGEST_HEAD
    digest = hashlib.sha256(content).hexdigest()
    write_saved(tmp_path, adapter_files(numbered_adapter(1), lambda _: {HEAD: content}))
    (tmp_path / HEAD).unlink()
    found = read(tmp_path, most, digest)
    assert found is not None
    assert found.weight.shape == (most, dim)


# -- refused ---------------------------------------------------------------------------------------

GOOD = {"weight": WEIGHT, "bias": BIAS}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": WEIGHT}, r"holds \['weight'\], expected 'bias' and 'weight'"),
        ({**GOOD, "scale": BIAS.clone()}, r"holds \['bias', 'scale', 'weight'\], expected"),
        ({"head.weight": WEIGHT, "bias": BIAS}, "holds .*head.weight"),
        ({**GOOD, "weight": WEIGHT.half()}, "'weight' is F16, expected F32"),
        ({**GOOD, "bias": BIAS.double()}, "'bias' is F64, expected F32"),
        ({**GOOD, "bias": BIAS.long()}, "'bias' is I64, expected F32"),
        ({**GOOD, "weight": WEIGHT.reshape(-1)}, r"weight is \[24\] and the bias \[3\], expected"),
        ({**GOOD, "weight": WEIGHT[None]}, r"weight is \[1, 3, 8\]"),
        ({**GOOD, "bias": BIAS[:, None]}, r"bias \[3, 1\], expected"),
        ({**GOOD, "bias": BIAS[:2]}, r"weight is \[3, 8\] and the bias \[2\]"),
        ({**GOOD, "weight": WEIGHT[:, :0]}, r"weight is \[3, 0\]"),
        ({"weight": WEIGHT[:2], "bias": BIAS[:2]}, "a head of 2 classes, and the task has 3 label"),
        (
            {**GOOD, "weight": WEIGHT * float("nan")},
            r"'weight' is not finite \(24 of its 24 .* nan",
        ),
        ({**GOOD, "bias": BIAS / 0}, r"'bias' is not finite .* inf\): the file is damaged"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
@pytest.mark.parametrize("place", ["file", "copy"])
def test_another_files_content_is_refused_by_what_is_wrong(
    tmp_path: Path, place: str, tensors: dict[str, Tensor], message: str
) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    content = save(tensors, {"format": "pt"})
    where = HEAD if place == "file" else rf"{WEIGHTS}: the header's 'ia3_head'"
    digest = with_head(tmp_path, content)
    if place == "copy":
        write_saved(tmp_path, adapter_files(numbered_adapter(1), lambda _: {HEAD: content}))
        (tmp_path / HEAD).unlink()
    with pytest.raises(BrokenFileError, match=rf"{where}.*{message}"):
        read(tmp_path, 3, digest)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"",
        lambda c: c[:7],
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: c[:20],
        lambda c: b"\xff" * 8 + c[8:],
        lambda c: c.replace(b"[3,8]", b"[8,8]"),
        lambda c: c.replace(b"[3,8]", b"[3,-8]"),
        lambda c: c.replace(b'"F32","shape":[3]', b'"F33","shape":[3]'),
    ],
)
def test_a_broken_head_is_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    digest = with_head(tmp_path, change(head_bytes(WEIGHT, BIAS)))
    with pytest.raises(BrokenFileError, match=HEAD):
        read(tmp_path, 3, digest)


def test_a_head_that_promises_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = {
        "weight": {"dtype": "F32", "shape": [3, 10**11], "data_offsets": [0, 12 * 10**11]},
        "bias": {"dtype": "F32", "shape": [3], "data_offsets": [12 * 10**11, 12 * 10**11 + 12]},
    }
    text = json.dumps(header).encode()
    digest = with_head(tmp_path, len(text).to_bytes(8, "little") + text)
    # And a file that is much, of which no more than a head may have is read.
    other = tmp_path / "other"
    with_head(other, b"")
    with open(other / HEAD, "wb") as file:
        file.truncate(10**11)
    tracemalloc.start()
    with pytest.raises(BrokenFileError, match=HEAD):
        read(tmp_path, 3, digest)
    with pytest.raises(BrokenFileError, match=rf"{HEAD} is longer than 5,000,000 bytes"):
        read(other, 3, digest)
    assert tracemalloc.get_traced_memory()[1] < 3 * LARGEST_HEAD
    tracemalloc.stop()


@pytest.mark.parametrize("copy", ["not base64!", "YQ", "é", "YQ==\n"])
def test_a_copy_that_is_no_base64_is_refused(tmp_path: Path, copy: str) -> None:
    save_encoder(tmp_path, 1)
    (tmp_path / HEAD).unlink()
    content = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"]["ia3_head"] = copy
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    with pytest.raises(BrokenFileError, match=rf"{WEIGHTS}: the header's 'ia3_head' is not base64"):
        state(tmp_path)
    # Whoever reads the adapter alone has no need of it.
    assert read_adapter(tmp_path).vectors


# -- with its adapter ------------------------------------------------------------------------------


def test_the_header_has_a_copy_which_counts_where_the_file_is_missing(tmp_path: Path) -> None:
    save_encoder(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, HEAD, TASK]
    whole = state(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    copy = header["__metadata__"]["ia3_head"]
    assert base64.b64decode(copy) == (tmp_path / HEAD).read_bytes()
    for name in (HEAD, TASK, CONFIG):
        (tmp_path / name).unlink()
        assert state(tmp_path) == whole


def test_a_head_that_another_program_put_there_is_found(tmp_path: Path) -> None:
    save_encoder(tmp_path, 1)
    weight, bias = torch.rand(3, 8, generator=GENERATOR), torch.ones(3)
    (tmp_path / HEAD).write_bytes(head_bytes(weight, bias))
    with pytest.raises(BrokenFileError, match=rf"{HEAD} is not the head that was saved: another"):
        state(tmp_path)
    # As the message says.
    task = json.loads((tmp_path / TASK).read_text())
    task["head"] = hashlib.sha256((tmp_path / HEAD).read_bytes()).hexdigest()
    (tmp_path / TASK).write_text(json.dumps(task))
    assert state(tmp_path)["head"] == [weight.tolist(), bias.tolist()]


def test_the_head_goes_with_its_adapter(tmp_path: Path) -> None:
    """An adapter that is saved over it is alone, whoever saves it, and PEFT's brings no copy."""
    model = IA3Model.without_adapters(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    model.add_adapter("default", IA3Config(target_modules=["0"], feedforward_modules=[]))
    save_encoder(tmp_path, 1)
    model.save_pretrained(tmp_path)
    assert not {HEAD, TASK} & {path.name for path in tmp_path.iterdir()}
    with SavedFolder(tmp_path) as saved:
        assert saved.text(HEAD) is None
    save_encoder(tmp_path, 1)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    theirs.save_pretrained(tmp_path)
    # It leaves files that are not its own, which are then those of other vectors.
    with pytest.raises(BrokenFileError, match="another program has replaced"):
        state(tmp_path)


def test_an_adapter_that_is_copied_without_its_head_brings_it(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a", 1)
    write_files(tmp_path / "b", {n: (tmp_path / "a" / n).read_bytes() for n in (CONFIG, WEIGHTS)})
    assert state(tmp_path / "b") == state(tmp_path / "a")
    # Over another classifier's files, which stay, it is found.
    save_encoder(tmp_path / "b", 2)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    with pytest.raises(BrokenFileError, match="another program has replaced"):
        state(tmp_path / "b")
    (tmp_path / "b" / TASK).unlink()
    with pytest.raises(BrokenFileError, match=rf"{HEAD} is a head of 4 classes, and the task has"):
        state(tmp_path / "b")


def test_peft_reads_an_adapter_that_has_a_head(tmp_path: Path) -> None:
    save_encoder(tmp_path, 1)
    assert (
        load_file(tmp_path / WEIGHTS).keys() == peft.utils.load_peft_weights(str(tmp_path)).keys()
    )
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).peft_type == "IA3"


def test_a_folder_in_the_place_of_the_head_is_not_written_over(tmp_path: Path) -> None:
    save_encoder(tmp_path, 1)
    os.unlink(tmp_path / HEAD)
    os.mkdir(tmp_path / HEAD)
    whole = state(tmp_path)
    with pytest.raises(FileExistsError, match=HEAD):
        save_encoder(tmp_path, 2)
    assert state(tmp_path) == whole
