"""What reads files from anywhere: each reader, valid files for it, and mutations of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import ia3
from ia3.adapter import layout, safetensors
from ia3.adapter.combining import combine
from ia3.adapter.convert import convert_tfew_authors
from ia3.adapter.files import read_adapter
from ia3.bank.bank import AdapterBank
from ia3.classify.estimator import FewShotClassifier
from ia3.classify.head_file import head_bytes, read_head
from ia3.classify.many_manifest import read_many_manifest
from ia3.classify.task_file import TaskFile
from ia3.errors import IA3Error
from ia3.files.hub import CARD_NAME, CONFIG_NAME
from ia3.files.records import append_record, read_records
from ia3.files.rows import read_rows
from ia3.files.saved import (
    COPIED,
    HASH_KEY,
    HEAD_NAME,
    PICKLED_NAME,
    TASK_NAME,
    WEIGHTS_NAME,
    SavedFolder,
)
from ia3.files.tables import fields_of, read_table, write_table
from ia3.model.ia3_model import IA3Model
from ia3.targets.config import IA3Config
from ia3.tfew.prompts.manifest import read_manifest
from ia3.tfew.prompts.promptsource import read_promptsource
from ia3.tfew.prompts.templates import Template

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from mutations import BETWEEN, Mutate, document, parts, text  # noqa: E402
from support.tfew import word_tokenizer  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = ("it", "is", "a", "good", "bad", "day", "so", "what", "great", "awful", "warm", "cold")
EXAMPLE = {
    "text": "a good day",
    "Text with spaces": "x|||y",
    "label": 1,
    "unknown": -1,
    "none": None,
    "items": ["one", "two", "three"],
    "mapping": {"a": [1, 2], "b": "c"},
    "number": 2.5,
}


@dataclass(frozen=True)
class Target:
    """`call` reads an input; `valid` are inputs that it takes; `weight` is its share of the time.

    An input that is several files has `BETWEEN` between them.
    """

    name: str
    call: Callable[[bytes], Any]
    valid: Sequence[bytes]
    mutate: Mutate
    words: Sequence[str]
    weight: float = 1.0


def all_targets(folder: Path) -> list[Target]:
    """The targets, which write their files into this folder."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.manual_seed(0)
    return [
        *_of_adapters(folder / "adapter"),
        *_of_pickles(folder / "pickle"),
        *_of_texts(folder / "texts"),
        *_of_classifiers(folder / "classifier"),
    ]


def each(*calls: Callable[[], Any]) -> None:
    """Make all calls; raise the last `IA3Error` of them."""
    refused = None
    for call in calls:
        try:
            call()
        except IA3Error as error:
            refused = error
    if refused is not None:
        raise refused


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- adapters --------------------------------------------------------------------------------------

CONFIG_WORDS = (
    *(
        "peft_type",
        "IA3",
        "task_type",
        "CAUSAL_LM",
        "SEQ_CLS",
        "target_modules",
        "k_proj",
        "v_proj",
    ),
    *("feedforward_modules", "down_proj", "exclude_modules", "modules_to_save", "lm_head", "norm"),
    *("embed_tokens", "q_proj", "model.layers.0.mlp.down_proj", "all-linear", "paper_sites", "mlp"),
    *(
        "init_ia3_weights",
        "inference_mode",
        "fan_in_fan_out",
        "base_model_name_or_path",
        "revision",
    ),
    *("auto_mapping", "base_model_class", "parent_library", ".*proj", r"model\.layers\.\d\..*"),
)
HEADER_WORDS = (
    *("dtype", "shape", "data_offsets", "__metadata__", "F32", "F16", "BF16", "I64", "BOOL", "U8"),
    *(
        "F8_E4M3",
        "F4",
        "C64",
        "F64",
        "format",
        "pt",
        layout.FROZEN_KEY,
        layout.BASE_KEY,
        HASH_KEY,
        *COPIED.values(),
        "samples",
    ),
    *("model_type", "llama", "base_model.model.model.layers.0.self_attn.k_proj.ia3_l", "ia3_l"),
    *("base_model.model.lm_head.weight", "base_model.model.model.layers.1.mlp.down_proj.ia3_l"),
    *("base_model.model.lm_head.base_layer.weight", "modules_to_save", "original_module"),
)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
} | {"complex64": torch.complex64, "bool": torch.bool, "float8_e4m3fn": torch.float8_e4m3fn}


def _of_adapters(folder: Path) -> list[Target]:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    saved = [
        IA3Config(),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        IA3Config(target_modules=r".*\.(v_proj|down_proj)", feedforward_modules=r".*down_proj"),
        IA3Config(target_modules=["v_proj"], modules_to_save=["norm"], feedforward_modules=[]),
    ]
    names = {CONFIG_NAME, WEIGHTS_NAME}
    configs, files = [], []
    for number, config in enumerate(saved):
        model = IA3Model(base, config)
        model.save_pretrained(folder / f"valid-{number}")
        model.unload()
        contents = {name: (folder / f"valid-{number}" / name).read_bytes() for name in names}
        configs.append(_json(json.loads(contents[CONFIG_NAME])))
        files.append(contents[WEIGHTS_NAME])
    files.append((folder / "valid-0" / WEIGHTS_NAME).read_bytes().replace(b"F32", b"I32"))
    configs.append(_json({"peft_type": "IA3", "target_modules": [*"abcdefgh"], "paper_sites": 1}))
    # As PEFT writes them, whose values may change.
    files += [_without_copies(file) for file in files]
    whole = [BETWEEN.join([c, *_split(f)]) for c, f in zip(configs * 2, files, strict=False)]
    whole.append(BETWEEN.join([b"", *_split(files[0])]))
    on_configs = document(CONFIG_WORDS)
    on_headers = document(HEADER_WORDS)
    use = _Adapters(base, folder)
    tensors = [{"key": key, "shape": [*shape]} for key, shape in use.shapes.items()]
    whole_dict = [_json(tensors), _json([{**each_, "dtype": "float16"} for each_ in tensors])]
    dict_words = (*HEADER_WORDS, *DTYPES, *_Adapters.KINDS, "key", "kind", "fill")
    return [
        Target("config", use.config, configs, on_configs, CONFIG_WORDS),
        Target("safetensors", use.safetensors, files, text(HEADER_WORDS), HEADER_WORDS),
        Target(
            "adapter folder",
            use.folder,
            whole,
            parts(on_configs, on_headers, text(HEADER_WORDS)),
            (*CONFIG_WORDS, *HEADER_WORDS),
            weight=3.0,
        ),
        Target("state dict", use.state_dict, whole_dict, document(dict_words), dict_words),
        Target("model card", use.card, CARDS, text(CARD_WORDS), CARD_WORDS),
    ]


def _split(file: bytes) -> list[bytes]:
    """The header and the values of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return [file[8:end], file[end:]]


def _without_copies(file: bytes) -> bytes:
    """A safetensors file without this library's metadata."""
    header, values = _split(file)
    read = json.loads(header)
    for key in (*COPIED.values(), HASH_KEY):
        read["__metadata__"].pop(key, None)
    text = json.dumps(read).encode()
    return len(text).to_bytes(8, "little") + text + values


class _Adapters:
    """Reads an adapter, and puts it on a model."""

    KINDS = ("expanded", "sparse", "meta", "requires_grad", "text", "number", "transposed")

    def __init__(self, base: Any, folder: Path) -> None:
        self.at = folder / "read"
        self.at.mkdir()
        self.begin(base)

    def begin(self, base: Any) -> None:
        self.base = base
        self.adapted = IA3Model(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), IA3Config())
        self.bank = AdapterBank(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), capacity=2)
        self.shapes = {k: v.shape for k, v in ia3.get_peft_model_state_dict(self.adapted).items()}
        self.before = self._state()

    def _state(self) -> Any:
        models = (self.base, self.adapted, self.bank.model)
        return [[*model.state_dict()] for model in models], [*self.adapted.peft_config]

    def config(self, data: bytes) -> None:
        path = self.at / CONFIG_NAME
        path.write_bytes(data)
        config = IA3Config.from_json(path)
        assert IA3Config.from_dict(json.loads(config.to_json())) == config
        with contextlib.redirect_stdout(io.StringIO()):
            ia3.explain(self.base, config)

    def safetensors(self, data: bytes) -> None:
        (self.at / WEIGHTS_NAME).write_bytes(data)
        with SavedFolder(self.at) as saved:
            each(
                lambda: saved.header,
                lambda: safetensors.read_tensors(saved),
                lambda: safetensors.read_floats(saved, layout.KEY_SUFFIX),
                *(lambda name=name: saved.text(name) for name in COPIED),
            )

    def folder(self, data: bytes) -> None:
        config, header, values = (*data.split(BETWEEN), b"", b"")[:3]
        # Without one, the copy in the header counts.
        (self.at / CONFIG_NAME).unlink(missing_ok=True)
        if config:
            (self.at / CONFIG_NAME).write_bytes(config)
        length = len(header).to_bytes(8, "little")
        (self.at / WEIGHTS_NAME).write_bytes(length + header + values)
        self.load()

    def load(self) -> None:
        """Read the folder in all ways, and compare what they say."""
        try:
            each(self._read, self._on_a_base, self._on_an_adapted, self._in_a_bank)
        finally:
            if self._state() != self.before:
                self.begin(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval())
                raise AssertionError("a model is not what it was")

    def _read(self) -> None:
        adapter = read_adapter(self.at)
        outline = layout.read_outline(self.at)
        assert outline.shapes == {name: tuple(v.shape) for name, v in adapter.vectors.items()}
        layout.read_vectors(outline)
        two = [("read", adapter), ("again", read_adapter(self.at))]
        with contextlib.suppress(IA3Error):  # not at the same sites, or copies of modules
            combine(two, [1, 1], "ties", 0.5)

    def _on_a_base(self) -> None:
        IA3Model.from_pretrained(self.base, self.at).unload()

    def _on_an_adapted(self) -> None:
        self.adapted.load_adapter(self.at, "other")
        self.adapted.delete_adapter("other")

    def _in_a_bank(self) -> None:
        self.bank.add("row", self.at)
        self.bank.gather(["row"], [0])
        self.bank.remove("row")

    def state_dict(self, data: bytes) -> None:
        """The tensors that a list in JSON describes."""
        try:
            described = json.loads(data)
            tensors = {str(each_.get("key")): self._tensor(each_) for each_ in described}
        except (ValueError, TypeError, AttributeError, RecursionError, RuntimeError, OverflowError):
            raise IA3Error("no tensors are described") from None
        try:
            ia3.set_peft_model_state_dict(self.adapted, tensors)
        finally:
            assert self._state() == self.before

    def _tensor(self, described: dict[str, Any]) -> Any:
        kind, fill, shape = (described.get(key) for key in ("kind", "fill", "shape"))
        shape = [min(abs(int(size)), 64) for size in shape or ()][:4]
        dtype = DTYPES.get(str(described.get("dtype")), torch.float32)
        small = torch.full([1] * len(shape), float(fill or 1)).to(dtype)
        if kind in ("text", "number"):
            return "1" if kind == "text" else 1.0
        if kind == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if kind == "sparse":
            return torch.ones(shape, dtype=dtype).to_sparse()
        expanded = small.expand(shape)
        if kind == "expanded":
            return expanded
        made = expanded.clone()
        if kind == "transposed":
            return made.T
        return made.requires_grad_() if kind == "requires_grad" else made

    def card(self, data: bytes) -> None:
        (self.at / CARD_NAME).write_bytes(data)
        self.adapted.save_pretrained(self.at)


CARDS = [
    b"---\nlibrary_name: peft\ntags:\n- ia3\n- text\nbase_model: a/b\n---\n\n# A card\n\nText.\n",
    b"# Only text\n\nA few words.\n",
    b"---\nlicense: mit\ndatasets: [a, b]\nmodel-index:\n- name: x\n  results:\n  - task:\n"
    b"      type: text\n    dataset:\n      name: d\n      type: d\n    metrics:\n"
    b"    - type: accuracy\n      value: 0.5\n---\n",
    b"---\ntags: one\neval_results: 3\nlanguage: no\n---\nText",
    b"---\n{}\n---\n",
]
CARD_WORDS = (
    *(
        "---\n",
        "tags:\n- a\n",
        "library_name: ",
        "base_model: ",
        "pipeline_tag: ",
        "license: mit\n",
    ),
    *(
        "model-index:\n",
        "- name: x\n",
        "  results:\n",
        "metrics:\n",
        "!!python/name:x ",
        "!x ",
        "&a ",
    ),
    *(
        "*a",
        "<<: ",
        "? ",
        "| ",
        "> ",
        "datasets: [",
        "language: ",
        "2001-01-01",
        "0x1",
        ".nan",
        "~",
    ),
)


# -- pickles ---------------------------------------------------------------------------------------

PICKLE_WORDS = (
    *(
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch\nFloatStorage\n",
        "ccollections\nOrderedDict\n",
    ),
    *(
        "cbuiltins\nlen\n",
        "cos\ngetcwd\n",
        "R",
        "b",
        "\x81",
        "Q",
        "(",
        "t",
        ")",
        ".",
        "0",
        "2",
        "}",
    ),
    *(
        "ctorch.storage\nTypedStorage\n",
        "K\x01",
        "M\x01\x02",
        "J\x01\x00\x00\x00",
        "q\x00",
        "h\x00",
    ),
)


def _of_pickles(folder: Path) -> list[Target]:
    folder.mkdir()
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    model = IA3Model(base, IA3Config())
    tensors = {k: v.detach() for k, v in ia3.get_peft_model_state_dict(model).items()}
    use = _Adapters(model.unload(), folder)
    (use.at / CONFIG_NAME).write_text(IA3Config().to_json())
    with torch.device("meta"):
        sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1}
        t5 = T5ForConditionalGeneration(
            T5Config(**sizes, num_heads=4, feed_forward_proj="gated-gelu")
        )
    theirs = {
        f"{name}.multi_lora_b": torch.ones(module.out_features, 1)
        for name, module in t5.named_modules()
        if name.endswith(("Attention.k", "Attention.v", "DenseReluDense.wi_1"))
    }

    def adapter(file: bytes) -> None:
        (use.at / PICKLED_NAME).write_bytes(file)
        use.load()

    def authors(file: bytes) -> None:
        path = folder / "finish.pt"
        path.write_bytes(file)
        convert_tfew_authors(path, t5)

    few = dict([*tensors.items()][:1])
    found = []
    for name, call, contents in (
        ("adapter_model.bin", adapter, [tensors, few]),
        ("the authors' .pt", authors, [theirs, dict([*theirs.items()][:1])]),
    ):
        files = [_pickled(content) for content in contents]
        old = _pickled(contents[1], _use_new_zipfile_serialization=False)
        mutate = text(PICKLE_WORDS)
        found += [
            Target(f"{name}, raw", call, [*files, old], mutate, PICKLE_WORDS),
            Target(
                f"{name}, unpacked",
                lambda data, call=call: call(_zipped(data)),
                [_unzipped(file) for file in files],
                parts(mutate, text(["\0", "\x7f", "\xff"])),
                PICKLE_WORDS,
            ),
        ]
    return found


def _pickled(content: dict[str, Tensor], **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _unzipped(file: bytes) -> bytes:
    """The pickle in one of PyTorch's files, and the values of its tensors."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        values = [
            archive.read(names[f"data/{n}"]) for n in range(len(names)) if f"data/{n}" in names
        ]
        return BETWEEN.join([archive.read(names["data.pkl"]), *values])


def _zipped(data: bytes) -> bytes:
    """The file of a pickle and values, whose checksums are right."""
    pickle, *values = data.split(BETWEEN)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for number, value in enumerate(values):
            archive.writestr(f"archive/data/{number}", value)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


# -- texts -----------------------------------------------------------------------------------------

JINJA_WORDS = (
    *(
        "{{ text }}",
        "{{ items",
        "{{ ",
        " }}",
        "{% for i in ",
        "%}",
        "{% endfor %}",
        "{% if ",
        "|||",
    ),
    *("{% endif %}", "{% else %}", "{% set x = ", "range(", "loop.index", "cycler(", "namespace("),
    *(
        "dict(",
        "zip(",
        "joiner(",
        "|join",
        "|replace(",
        "|truncate",
        "|upper",
        "|list",
        "|map(",
        "~",
    ),
    *(
        "|batch(",
        "|slice(",
        "|sort",
        "|tojson",
        "|format(",
        "|int",
        "|string",
        "|choice",
        "|unique",
    ),
    *(
        "|most_frequent",
        "|sum",
        "|length",
        "|random",
        "|groupby(",
        "|select(",
        "|urlize",
        "|xmlattr",
    ),
    *(".format(", ".join(", ".replace(", ".__class__", ".split(", ".ljust(", ".zfill(", "[::-1]"),
    *(" * 9999", " ** 99", " + text", " % ", " in ", " is defined", "answer_choices", "fields["),
    *("{% macro m(a) %}", "{% endmacro %}", "m(1)", "{% include 'a' %}", "{% import 'a' as b %}"),
    *("{% filter upper %}", "{% endfilter %}", "{% block b %}", "{% raw %}", "{# ", " #}", "self."),
    *(
        "{%- ",
        " -%}",
        "mapping.items()",
        "none",
        "number",
        "unknown",
        "label",
        "'a'",
        "1e9",
        "0x7f",
    ),
    *(
        "{% call m() %}",
        "{% with a = 1 %}",
        "{% do ",
        "{% break %}",
        "lipsum(",
        "{% extends 'a' %}",
    ),
)
TEMPLATES = [
    b"{{ text }}\nIs it {{ answer_choices | join(' or ') }}? ||| {{ answer_choices[label] }}",
    b"{% for item in items %}{{ loop.index }}. {{ item | upper }}\n{% endfor %}{{ text }}",
    b"{% set n = namespace(x=0) %}{% for i in [1] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}",
    b"{% macro q(a, b=1) %}{{ a }}{% endmacro %}{{ q(text) }}{{ fields['Text with spaces'] }}",
    b"{% if label %}{{ text[:5] ~ 1 }}{% else %}{{ mapping.b | replace('c', 'd') }}{% endif %}",
    b"{{ ([0] * 9) | map('string') | join }}{{ items | choice }}{{ 'a' * 9 }}{{ text | title }}",
    b"{{ '%s' | string }}{{ text.split() | unique | list }}{{ items | batch(2) | list | tojson }}",
]
YAML_WORDS = (
    *(
        "templates:",
        "!Template",
        "!TemplateMetadata",
        "name: ",
        "jinja: ",
        "answer_choices: ",
        "id: ",
    ),
    *(
        "metadata: ",
        "original_task: true",
        "\n  ",
        "\n    ",
        "- ",
        "? ",
        ": ",
        "|-\n",
        ">\n",
        "<<: *a",
    ),
    *(
        "&a ",
        "*a",
        "!!python/object:a.b ",
        "!!binary ",
        "!!set ",
        "!!float ",
        "!!timestamp ",
        "!!omap ",
    ),
    *(
        "2001-01-01",
        "1_0",
        "0o7",
        "0x",
        "1:30",
        ".inf",
        ".nan",
        "~",
        "yes",
        "{",
        "}",
        "[",
        "]",
        "%YAML",
    ),
    *(
        "---\n",
        "...\n",
        "#",
        "'",
        '"',
        "\\x",
        "tasks:",
        "data: train.csv",
        "template: ",
        "label: queue",
    ),
    *("choices: ", "split: ", "defaults:", "model: ", "steps: 1", "seed: ", "learning_rate: 1e-3"),
    *("chat: true", "text: [text]", "init_from: ", "subset: ", "rte:", "a: ", "b: "),
)
PROMPTS = [
    b"templates:\n  a: !Template\n    name: first\n    jinja: '{{ text }} ||| {{ "
    b"answer_choices[label] }}'\n    answer_choices: no ||| yes\n    metadata: !TemplateMetadata\n"
    b"      original_task: true\n  b: !Template\n    name: next\n    jinja: |-\n      {{ text }}\n"
    b"      ||| {{ answer_choices[0] }}\n    answer_choices: '{{ items | join(\"|||\") }}'\n",
    _json(
        {
            "templates": {
                "a": {
                    "name": "n",
                    "jinja": "{{ text }} ||| {{ answer_choices[label] }}",
                    "answer_choices": "a ||| b",
                    "metadata": {"original_task": True},
                }
            }
        }
    ),
]
MANIFESTS = [
    b"tasks:\n  rte:\n    data: rte.jsonl\n  tickets:\n    data: train.csv\n    template: "
    b'"{{ text }}\\nCategory:"\n    label: queue\n    choices: {billing: bill, delivery: parcel}\n',
    _json(
        {
            "tasks": {
                "a": {"data": "train.csv", "template": ["{{ text }}?"], "label": "queue"},
                "b": {"data": "rte.jsonl", "templates": "prompts.yaml", "split": "train"},
            }
        }
    ),
]
MANY = [
    b"model: tiny\ndefaults:\n  steps: 5\n  label: queue\ntasks:\n  a:\n    data: train.csv\n"
    b"    text: text\n  b:\n    data: rte.jsonl\n    text: [premise, hypothesis]\n    seed: 1\n",
    _json(
        {
            "defaults": {"learning_rate": "1e-3", "chat": "false", "template": "{{ text }}"},
            "tasks": {"a": {"data": "train.csv", "choices": {"x": "y"}, "init_from": "start"}},
        }
    ),
]
TABLE_WORDS = ("text", "label", ",", "\t", "\n", "\r\n", '"', '""', ";", "\0", "\ufeff", "a", "1")
ROWS = b'text,label\nIt is good,pos\n"quoted, with ""quotes""\nand lines",neg\n,pos\n'
LINES = [
    b'{"text": "good", "label": 1}\n{"text": "bad", "label": 0, "more": [1, {"a": null}]}\n',
    b'{"text": "good", "label": "a"}\n\n{"text": 1.5, "label": "b"}\n',
]
RECORDS = [b'{"task": "a", "seconds": 1.5}\n{"task": "b", "seconds": 2}\n', b'{"task": "a"}', b""]
RECORD_WORDS = ("task", "seconds", "\n", '{"task": "c"}\n', "{", "}", "null")


def _of_texts(folder: Path) -> list[Target]:
    folder.mkdir()
    (folder / "train.csv").write_text("text,queue\nlost parcel,delivery\nwrong sum,billing\n")
    rte = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1)]
    (folder / "rte.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rte))
    (folder / "prompts.yaml").write_bytes(PROMPTS[0])

    def template(data: bytes) -> None:
        made = Template(data.decode("utf-8", "surrogateescape"))
        made.reads("text")
        each(lambda: made.render(EXAMPLE, ["a", "b"]), lambda: made.parts(EXAMPLE, ["a", "b"]))

    def promptsource(data: bytes) -> None:
        path = folder / "templates.yaml"
        path.write_bytes(data)
        for made in read_promptsource(path):
            each(lambda m=made: m.render(EXAMPLE), lambda m=made: m.render(EXAMPLE, labelled=False))

    def manifest(read: Callable[[Path], Any]) -> Callable[[bytes], None]:
        def call(data: bytes) -> None:
            path = folder / "manifest.yaml"
            path.write_bytes(data)
            read(path)

        return call

    def table(suffix: str) -> Callable[[bytes], None]:
        def call(data: bytes) -> None:
            path = folder / f"rows{suffix}"
            path.write_bytes(data)
            rows = read_table(path)
            again = folder / "again.jsonl"
            write_table(rows, again, as_json=True)
            assert [*map(dict, read_table(again))] == [*map(dict, rows)]
            fields_of(read_rows(path, text=("text",), label="label"), ["text"])

        return call

    def records(data: bytes) -> None:
        path = folder / "records.jsonl"
        path.write_bytes(data)
        before = read_records(path, lambda record: "task" in record, "a task")
        append_record(path, {"task": "new"})
        after = read_records(path, lambda record: "task" in record, "a task")
        assert after == [*before, {"task": "new"}]

    on_templates, on_rows, on_yaml = text(JINJA_WORDS), text(TABLE_WORDS), document(YAML_WORDS)
    tabs = ROWS.replace(b",", b"\t")
    return [
        Target("template", template, TEMPLATES, on_templates, JINJA_WORDS, weight=2.0),
        Target("promptsource", promptsource, PROMPTS, on_yaml, (*YAML_WORDS, *JINJA_WORDS)),
        Target("pretrain manifest", manifest(read_manifest), MANIFESTS, on_yaml, YAML_WORDS),
        Target("fit-many manifest", manifest(read_many_manifest), MANY, on_yaml, YAML_WORDS),
        Target("CSV", table(".csv"), [ROWS], on_rows, TABLE_WORDS),
        Target("TSV", table(".tsv"), [tabs], on_rows, TABLE_WORDS, weight=0.5),
        Target("JSON Lines", table(".jsonl"), LINES, on_rows, TABLE_WORDS),
        Target("records", records, RECORDS, text(RECORD_WORDS), RECORD_WORDS, weight=0.5),
    ]


# -- classifiers -----------------------------------------------------------------------------------

TASK_WORDS = (
    *("format", "model", "templates", "fields", "labels", "choices", "chat", "steps", "text"),
    *("learning_rate", "seed", "upper_blocks", "{{ text }}", "good", "bad", "template", "weights"),
    *("engine", "language-model", "temperature", "threads", "selection", "head", "vectors"),
    *("name", "accuracy", "error", "note", "0" * 64, "embedding", "pooling", "normalize"),
    *("max_length", "prompt", "prompt_tokens", "dense", "tokens", "mean"),
    *JINJA_WORDS[:20],
)

# The keys of the first format.
ENGINELESS = (
    *("model", "templates", "fields", "labels", "choices", "chat", "steps", "learning_rate"),
    *("seed", "upper_blocks", "vectors"),
)
HEAD_WORDS = (
    *("weight", "bias", "dtype", "shape", "data_offsets", "__metadata__", "F32", "F16", "F64"),
    *("format", "pt", "[3,8]", "[3]", "[0,96]", "[0,12]", "[12,108]"),
)


def _of_classifiers(folder: Path) -> list[Target]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    tokenizer = word_tokenizer(WORDS)
    options = {"tokenizer": tokenizer, "steps": 0}
    texts = ["a good day", "so bad"]
    FewShotClassifier(model, **options).fit(texts, ["good", "bad"]).save(folder)
    path = folder / TASK_NAME
    task = json.loads(path.read_bytes())
    numbered = {**task, "labels": [0, 1], "templates": ["{{ text }} is", "it is {{ text }}"]}
    named = {**task, "fields": ["a", "b"], "templates": ["{{ a }} or {{ b }}"], "model": "tiny"}

    def classifier(data: bytes) -> None:
        path.write_bytes(data)
        loaded = FewShotClassifier.load(folder, model=model, tokenizer=tokenizer)
        found = loaded.predict_proba([dict.fromkeys(loaded.fields_, "warm day")])
        assert found.shape == (1, len(loaded.classes_))

    def head(data: bytes) -> None:
        header, _, values = data.partition(BETWEEN)
        content = len(header).to_bytes(8, "little") + header + values
        (folder / HEAD_NAME).write_bytes(content)
        with SavedFolder(folder) as saved:
            found = read_head(saved, 3, hashlib.sha256(content).hexdigest())
        assert found.weight.shape == (3, found.weight.shape[1])
        assert found.bias.shape == (3,)

    def task_file(data: bytes) -> None:
        read = TaskFile.from_json(data, "the task")
        assert TaskFile.from_json(read.to_json(), "the same") == read

    seen = {"engine": "encoder", "name": "tiny", "accuracy": 0.5, "error": 0.1, "note": "3 texts"}
    embedding = {"pooling": "mean", "normalize": True, "max_length": 256, "prompt": "query: "}
    embedding |= {"prompt_tokens": 2, "dense": "0" * 64, "tokens": "1" * 64}
    older = {name: task[name] for name in task if name in ENGINELESS} | {"format": 1}
    of_encoder = {**task, "engine": "encoder", "head": "0" * 64, "selection": [seen], "threads": 2}
    of_encoder |= {"embedding": embedding}
    valid = [_json(each_) for each_ in (task, numbered, named, older)]
    parsed = [*valid, _json(of_encoder), _json({**of_encoder, "templates": [], "choices": []})]
    heads = [head_bytes(torch.rand(3, dim), torch.rand(3)) for dim in (1, 8)]
    apart = [BETWEEN.join(_split(content)) for content in heads]
    on_heads = parts(document(HEAD_WORDS), text(HEAD_WORDS))
    on_tasks = document(TASK_WORDS)
    return [
        Target("task file", classifier, valid, on_tasks, TASK_WORDS, weight=2.0),
        Target("task file, parsed", task_file, parsed, on_tasks, (*TASK_WORDS, "encoder")),
        Target("head", head, apart, on_heads, HEAD_WORDS),
    ]


def found_name(name: str) -> str:
    """A target's name as part of a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)
