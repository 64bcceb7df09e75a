"""TRL's trainers train a model with adapters as they train PEFT's, with nothing said to them."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.pairs import randomize, vectors
from tokenizers import Tokenizer, models, pre_tokenizers

import ia3
from ia3 import IA3Model

pytestmark = [
    pytest.mark.datasets,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

WORDS = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(60)]
LLAMA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
FAST = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
GENERATING = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed")


def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def text(seed, count=4):
    ids = torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in ids)


def base(kind=hf.LlamaForCausalLM, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(hf.LlamaConfig(**LLAMA, **config)).eval()


def adapted(library, trainer="SFT", **config):
    """A model with random vectors around one, the same in both libraries."""
    if trainer == "Reward":
        model, task = base(hf.LlamaForSequenceClassification, num_labels=1), "SEQ_CLS"
    else:
        model, task = base(), "CAUSAL_LM"
    model = library.get_peft_model(model, library.IA3Config(task_type=task, **config))
    randomize(vectors(model))
    return model


def rows(trainer):
    """Eight examples as a trainer has them."""
    prompts = [text(seed) for seed in range(8)]
    if trainer == "SFT":
        return [{"text": prompt} for prompt in prompts]
    if trainer == "KTO":
        answered = [{"prompt": p, "completion": f" {text(10 + i)}"} for i, p in enumerate(prompts)]
        return [{**row, "label": bool(i % 2)} for i, row in enumerate(answered)]
    if trainer in ("GRPO", "RLOO"):
        return [{"prompt": prompt} for prompt in prompts]
    pairs = [{"chosen": f" {text(10 + i)}", "rejected": f" {text(20 + i)}"} for i in range(8)]
    return [{"prompt": prompt, **pair} for prompt, pair in zip(prompts, pairs, strict=True)]


def reward(completions, **_):
    return [float(len(set(c.split())) + sum(map(ord, c)) % 7) for c in completions]


def made(trl, trainer, model, folder, data=None, asked=None, peft_config=None, **arguments):
    """One of TRL's trainers, ready to train three steps."""
    from datasets import Dataset

    given = {"max_steps": 3, "save_steps": 2, **QUIET, **FAST, **arguments}
    more = {} if peft_config is None else {"peft_config": peft_config}
    if trainer in ("GRPO", "RLOO"):
        given, more = {**GENERATING, **given}, {**more, "reward_funcs": reward}
    args = getattr(trl, f"{trainer}Config")(str(folder), **given)
    return getattr(trl, f"{trainer}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data or rows(trainer)),
        eval_dataset=Dataset.from_list(asked) if asked else None,
        processing_class=tokenizer(),
        **more,
    )


def logged(run):
    kept = ("loss", "kl", "reward", "rewards/chosen", "logps/rejected", "mean_token_accuracy")
    return [{key: entry[key] for key in kept if key in entry} for entry in run.state.log_history]


def values(model):
    library = ia3 if isinstance(model, IA3Model) else peft
    return copy.deepcopy(library.get_peft_model_state_dict(model))


def files(folder):
    """The files in a folder and below it, without what differs between the two libraries."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.endswith("README.md")}


CHECKPOINTING = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
CHOICES = {
    "checkpointing": {},  # TRL's default
    "reentrant": CHECKPOINTING,
    "no checkpointing": {"gradient_checkpointing": False},
}


@pytest.mark.parametrize(
    ("trainer", "choice"),
    [
        *(("SFT", choice) for choice in CHOICES),
        *((trainer, "checkpointing") for trainer in ("DPO", "GRPO", "RLOO", "KTO", "Reward")),
    ],
)
def test_losses_vectors_and_checkpoints_are_pefts(trl, trainer, choice, tmp_path):
    runs = []
    for library in (ia3, peft):
        folder = tmp_path / library.__name__
        run = made(trl, trainer, adapted(library, trainer), folder, **CHOICES[choice])
        start = values(run.model)
        run.train()
        trained = values(run.model)
        assert all(not torch.equal(trained[name], start[name]) for name in start)
        runs.append((logged(run), trained, files(folder / "checkpoint-2")))
    ours, theirs = runs
    assert len(theirs[0]) == 4
    for found, expected in zip(ours[0], theirs[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_what_peft_config_would_have_given(trl, trainer, tmp_path):
    runs = []
    given = {"model": base(), "peft_config": peft.IA3Config(task_type="CAUSAL_LM")}
    theirs = made(trl, trainer, folder=tmp_path / "theirs", **given)
    model = ia3.get_peft_model(base(), ia3.IA3Config(task_type="CAUSAL_LM"))
    ours = made(trl, trainer, model, tmp_path / "ours")
    if trainer == "DPO":
        # Given a model, the trainer adds a copy as reference; without it that is the base model.
        model.delete_adapter("ref")
    for run in (ours, theirs):
        run.train()
        runs.append(
            (logged(run), files(Path(run.args.output_dir, "checkpoint-3")), values(run.model))
        )
    for found, expected in zip(runs[0][0], runs[1][0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-3, atol=1e-4)


def test_the_reference_of_dpo_is_the_base_model(trl, tmp_path):
    data, tokens = rows("DPO"), tokenizer()
    model = adapted(ia3).eval()

    def score(logits_of, row):
        prompt, answer = tokens(row["prompt"]).input_ids, tokens(row["chosen"]).input_ids
        ids = torch.tensor([[*prompt, *answer, 2]])
        with torch.no_grad():
            scores = logits_of(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    plain = base()
    gains = [float(score(model, row) - score(plain, row)) for row in data]
    run = made(trl, "DPO", model, tmp_path, max_steps=1, per_device_train_batch_size=8, beta=0.3)
    run.train()
    assert abs(sum(gains)) > 1e-3
    assert logged(run)[0]["rewards/chosen"] == pytest.approx(0.3 * sum(gains) / 8, rel=1e-3)
    assert model.active_adapter == "default"


def test_a_run_of_dpo_that_was_stopped_goes_on(trl, tmp_path):
    def run(folder, steps):
        constant = {"lr_scheduler_type": "constant", "max_steps": steps}
        return made(trl, "DPO", adapted(ia3), tmp_path / folder, **constant)

    whole, rest = run("whole", 4), run("parts", 4)
    whole.train()
    run("parts", 2).train()
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 4
    assert len(rest.state.log_history) == 5
    torch.testing.assert_close(values(rest.model), values(whole.model), rtol=0, atol=0)


def test_a_trained_model_merges_and_loads(trl, tmp_path):
    run = made(trl, "SFT", adapted(ia3), tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    ids = torch.arange(4, 12)[None]
    expected = run.model.eval()(input_ids=ids).logits
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "saved").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    merged = run.model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_adapters_that_are_there_and_a_config_are_refused(trl, tmp_path):
    """The trainer would wrap a model that has adapters once more."""
    from datasets import Dataset

    args = trl.SFTConfig(str(tmp_path), **QUIET)
    given = {"args": args, "train_dataset": Dataset.from_list(rows("SFT"))}
    given |= {"processing_class": tokenizer()}
    with pytest.raises(ValueError, match="You passed a `PeftModel` instance together with"):
        trl.SFTTrainer(model=adapted(ia3), peft_config=peft.IA3Config(), **given)
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig`"):
        trl.SFTTrainer(model=base(), peft_config=ia3.IA3Config(), **given)
