"""The T-Few recipe (paper section 3.5), on transformers' `Trainer`.

Each step takes `TFewConfig.batch_size` examples, draws one prompt template for each, scores all
their answer choices, and computes the three loss terms (`losses`). Training is reproducible, and
goes on from a checkpoint to the same bits.

Of several processes each computes a part of every step's examples (`get_batch_samples`), and one
sum of their gradients (`_add_up`) has all take the same update. The Trainer of each believes that
it is the only one: it would part the data by itself, and average.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor, get_linear_schedule_with_warmup
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    get_last_checkpoint,
    sort_checkpoints,
)

from ...adapter.fingerprint import Fingerprint, fingerprint
from ...arguments import check_callable, instance, listed, path_of
from ...base.loading import BaseModel
from ...base.processes import is_launched, others_named, processes, unlaunched
from ...base.products import fast_products, steady_attention
from ...base.threads import Threads
from ...core.spread import check_examples_can_be_shared_out, is_fsdp
from ...errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    MissingExtraError,
    StateError,
    shown,
)
from ...files.atomic import check_folder, new_folder_beside
from ...files.hub import CARD_NAME
from ...files.json import parse_object
from ...model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..prompts.encoding import EncodedExample, TrainingExample
from ..scoring.choices import (
    computes_again,
    count_passes,
    example_batches,
    longest_sequence,
    token_scores,
)
from .losses import Counts, token_loss
from .plateau import Plateau
from .recipe import TFewConfig as TFewConfig
from .steps import (
    DivergedError as DivergedError,
    StopTraining as StopTraining,
    TrainingStep as TrainingStep,
    steps_of,
    threads_kept,
)

if importlib.util.find_spec("accelerate") is None:
    raise MissingExtraError("accelerate", "tfew", "training")

# In a checkpoint, beside the Trainer's own files: what identifies the run, its steps so far, and
# hashes of the other files.
RUN_NAME = "ia3_run.json"
CHECKPOINT_STEPS = 25
# Compared by digests, which error messages do not show.
DIGESTS = ("examples", "base model", "first vectors")
# Settings of the Trainer by which the processes of a job take the same steps.
SHARED = ("max_steps", "gradient_accumulation_steps", "save_strategy", "optim", "learning_rate")
EXAMPLES = "a list of TrainingExample, as Task.training_examples gives them"


def train(
    base: BaseModel,
    ia3_model: IA3Model,
    examples: Sequence[TrainingExample],
    config: TFewConfig,
    on_step: Callable[[TrainingStep], None] | None = None,
    *,
    checkpoints: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    threads: Threads | None = None,
    **arguments: Any,
) -> list[TrainingStep]:
    """Train the active adapters' vectors; the global random state is left as it was.

    Args:
        base: the model under `ia3_model`, with its tokenizer.
        ia3_model: has the vectors to train.
        examples: the training set; every step draws one template for each of its examples.
        config: the recipe.
        on_step: called after every optimizer step; where it raises `StopTraining`, training ends.
            Of several processes the first one alone calls it.
        checkpoints: a folder for checkpoints, every 25 steps (`save_steps`) and at the end, of
            which the last one stays. If it has a checkpoint of the same run, training goes on from
            there, and ends with the vectors of a run without a break: on a CPU, to the last bit.
            One run at a time has a folder. Of several processes the first one writes; a run may go
            on with another number of them.
        callbacks: the Trainer's; those of the first process decide when training ends.
        threads: chooses the number of threads of each step on a CPU; by default torch's is left as
            it is. A run that goes on begins with the number of the checkpoint.
        arguments: as `training_arguments` takes them.

    Returns:
        One record a step, those before the checkpoint included.

    Raises:
        InvalidTypeError: an argument is of another type.
        DivergedError: the loss, a gradient or an update is not finite; the vectors are those before
            that step.
        IA3Error: the checkpoint is another run's, an argument does not fit, or the processes of a
            job were given different ones.
        BrokenFileError: a file of the checkpoint is damaged.
        StateError: another run trains with these checkpoints, or a process of this job has ended.
        OSError: a checkpoint cannot be written; the one before it stays.
    """
    check_callable("on_step", on_step)
    if checkpoints is not None:
        checkpoints = path_of("checkpoints", checkpoints)
        check_folder(checkpoints)
        saving = {"save_strategy": "steps", "save_steps": CHECKPOINT_STEPS, "save_total_limit": 1}
        arguments = {**saving, **arguments}
    with (
        tempfile.TemporaryDirectory() as nowhere,
        _random_state_restored(),
        _accelerate_restored(),
        others_named(),
    ):
        settings = training_arguments(base, config, checkpoints or nowhere, **arguments)
        trainer = TFewTrainer(base, ia3_model, examples, config, settings, callbacks, threads)
        if on_step is not None and processes().is_first:
            trainer.add_callback(_OnStep(trainer.history, on_step))
        trainer.train(resume_from_checkpoint=checkpoints is not None)
    trainer.check_finite()
    return trainer.history


def training_arguments(
    base: BaseModel, config: TFewConfig, folder: str | Path, **arguments: Any
) -> TrainingArguments:
    """The recipe as transformers' `TrainingArguments`.

    Args:
        base: the model to train on.
        config: the recipe.
        folder: for checkpoints and logs.
        arguments: further ones, or others instead: `bf16=True`, `gradient_accumulation_steps=4` (of
            `batch_size` examples together), `logging_steps=10`, `save_steps=100`, `report_to=...`

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: the model is on a GPU that the Trainer would not train on, or
            `gradient_accumulation_steps` does not divide the batch size.
    """
    _check(base, config)
    folder = path_of("folder", folder)
    if base.device.type == "cuda" and base.device.index not in (None, 0):
        raise IA3Error(
            f"training on {base.device} is not supported: choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    parts = arguments.get("gradient_accumulation_steps", 1)
    if parts < 1 or config.batch_size % parts:
        expected = f"a divisor of the batch_size {config.batch_size}"
        raise IA3Error(f"gradient_accumulation_steps is {parts}, expected {expected}")
    defaults = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size // parts,
        "optim": "adafactor",
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "use_cpu": base.device.type == "cpu",
        # The Trainer writes it into the model's config, where it would stay.
        "use_cache": getattr(base.model.config, "use_cache", False),
        "save_strategy": "steps" if "save_steps" in arguments else "no",
        "logging_strategy": "steps" if "logging_steps" in arguments else "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    with _as_one_process():
        settings = TrainingArguments(**{**defaults, **arguments})
        # On a machine of several GPUs the Trainer would multiply the batch and split the model.
        settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def _check(base: BaseModel, config: TFewConfig) -> None:
    instance("base", base, BaseModel, "a BaseModel, as load_base_model gives it")
    instance("config", config, TFewConfig, "a TFewConfig")


class TFewTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with T-Few's loss, optimizer and schedule.

    Gradient accumulation and `TFewConfig.max_tokens` change a step's gradients by rounding alone. A
    checkpoint holds the adapters, without the base model's weights, and the state of the optimizer,
    the schedule and the random numbers; it appears whole or not at all.

    Its arguments are those of `train`, with `arguments` made by `training_arguments`; `history` has
    one `TrainingStep` a step.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: there are no examples, or the processes of a job were given different ones.
    """

    # The Trainer would ask for no checkpoints where transformers has spread the base model, and add
    # up the gradients itself. Here the optimizer has but vectors, which are whole.
    is_distributed_loading_by_transformers = property(lambda self: False, lambda self, value: None)

    def __init__(
        self,
        base: BaseModel,
        ia3_model: IA3Model,
        examples: Sequence[TrainingExample],
        config: TFewConfig,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
        threads: Threads | None = None,
    ) -> None:
        _check(base, config)
        instance("ia3_model", ia3_model, IA3Model, "an IA3Model")
        instance("arguments", arguments, TrainingArguments, "those of training_arguments()")
        for callback in listed("callbacks", callbacks, "a list of callbacks"):
            known = isinstance(callback, TrainerCallback)
            if not known and not (
                isinstance(callback, type) and issubclass(callback, TrainerCallback)
            ):
                raise InvalidTypeError(f"callbacks holds {shown(callback)}, expected the Trainer's")
        for example in listed("examples", examples, EXAMPLES):
            instance("an example", example, TrainingExample, EXAMPLES)
        if not examples:
            raise IA3Error("there are no examples to train on: expected at least one")
        if processes().count > 1:
            check_examples_can_be_shared_out(base.model)
        first = [ia3_model.vectors(name) for name in ia3_model.active_adapters]
        self._run = described_run(fingerprint(ia3_model.model), first, examples, config)
        processes().check_same({**self._run, **{name: getattr(arguments, name) for name in SHARED}})
        # The authors' scales its steps by the size of a vector; the Trainer's default does not.
        settings = {"scale_parameter": True, "relative_step": False}
        adafactor = (Adafactor, {"lr": arguments.learning_rate, **settings})
        with _as_one_process():
            super().__init__(
                model=ia3_model,
                args=arguments,
                train_dataset=list(examples),
                data_collator=lambda batch: {"examples": batch},
                callbacks=list(callbacks),
                optimizer_cls_and_kwargs=adafactor if arguments.optim == "adafactor" else None,
            )
        if threads is not None:
            instance("threads", threads, Threads, "a Threads of ia3.base.threads")
        self._threads = threads if base.device.type == "cpu" else None
        self._plateau: Plateau | None = None
        if config.stop_at_plateau:
            if arguments.lr_scheduler_type != "linear":
                problem = "has a decay of its own, and so has stop_at_plateau: expected 'linear'"
                raise IA3Error(f"lr_scheduler_type {arguments.lr_scheduler_type.value!r} {problem}")
            self._plateau = Plateau(arguments.max_steps)
            self.add_callback(_AtPlateau(self._plateau))
        # It would print what `on_step` reports.
        self.remove_callback(PrinterCallback)
        self.add_callback(_LastGood(self))
        self.history: list[TrainingStep] = []
        self._base = base
        self._config = config
        self._is_spread = processes().count > 1 and is_fsdp(base.model)
        encoded = (each for example in examples for each in example.encoded)
        shortest = min(encoded, key=longest_sequence)
        # More choices may take more passes than another process makes.
        self._shortest = EncodedExample(shortest.prompt, shortest.choices[:1])
        # Of the current step: loss and terms of the parts so far, and how many parts are left.
        self._terms = torch.zeros(4, dtype=torch.float32)
        self._parts_left = 0
        self._staging: Path | None = None
        # While a checkpoint is written: the folder that the Trainer is to write it into.
        self._writes_into: Path | None = None

    # -- a step -----------------------------------------------------------------------------------

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The authors' linear schedule, unless the arguments name another."""
        if self.args.lr_scheduler_type == "linear":
            # The Trainer would round the warm-up to whole steps; the authors' may end within one.
            # Its first step has the rate 0, which would be all of a training of one step.
            warmup = self._config.warmup_ratio * num_training_steps
            self.lr_scheduler = get_linear_schedule_with_warmup(
                self.optimizer if optimizer is None else optimizer,
                warmup if num_training_steps > 1 else 0,
                num_training_steps,
            )
            if self._plateau is not None:
                linear, plateau = self.lr_scheduler.lr_lambdas[0], self._plateau
                shares = [lambda step: linear(step) * plateau.share_of_rate(step)]
                self.lr_scheduler.lr_lambdas = shares * len(self.lr_scheduler.lr_lambdas)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """All parts of one step, with a template drawn for each example, and the step's counts.

        Of several processes, each gets its share of the examples, with the counts of all.
        """
        parts, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # By the step's number, not from the global generator: the Trainer's loader is a part ahead
        # of the step, so that a checkpoint's random state would not lead to the same draws.
        draws = random.Random(f"{self._config.seed}/{self.state.global_step}")
        drawn = [
            [(draws.choice(e.encoded), e.label, e.weight) for e in part["examples"]]
            for part in parts
        ]
        examples = [example for part in drawn for example in part]
        right = sum(len(e.choices[label]) for e, label, _ in examples)
        tokens = sum(len(choice) for e, *_ in examples for choice in e.choices)
        counts = Counts(len(examples), right, tokens - right)
        self._terms = torch.zeros(4, dtype=torch.float32)
        self._parts_left = len(parts)
        return [{"drawn": processes().own(part), "counts": counts} for part in drawn], items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the gradients of one part of a step, and with the last part finish it.

        Returns what is new of the step's loss, which is 0 before its last part.
        """
        if self._threads is None:
            terms = self._gradients(model, inputs)
        else:
            examples = [example for example, *_ in inputs["drawn"]]
            tokens = sum(len(e.prompt) + sum(map(len, e.choices)) for e in examples)
            terms = self._threads.step(lambda: self._gradients(model, inputs), tokens)
        self._terms = self._terms.to(terms) + terms
        self._parts_left -= 1
        if self._parts_left > 0:
            return torch.zeros_like(terms[0])
        self._add_up()
        number = self.state.global_step + 1
        step = TrainingStep(number, self._last_step, *self._terms.tolist())
        if not math.isfinite(step.loss):
            raise self._diverged(number, f"the loss is {step.loss}")
        self._check_gradients(number)
        self.history.append(step)
        self._follow_loss()
        return self._terms[0]

    @fast_products()
    def _gradients(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Of this process's share of one part of a step, itself in parts of `max_tokens` tokens.

        Returns the loss and its terms, `[4]`; gradients are added to those that there are.
        """
        model.train()
        drawn: list[tuple[EncodedExample, int, float]] = inputs["drawn"]
        examples = [example for example, *_ in drawn]
        max_tokens = self._config.max_tokens
        terms = torch.zeros(4, dtype=torch.float32, device=self.args.device)
        for part, most_passes in self._parts_of(examples):
            of_part = [examples[i] for i in part] or [self._shortest]
            again = computes_again(self._base, of_part, max_tokens)
            with steady_attention() if again else nullcontext():
                # The Trainer wraps a model's forward in autocast, but not the one called here.
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    scores = token_scores(
                        self._base, of_part, max_tokens=max_tokens, most_passes=most_passes
                    )
                    if not part:
                        self.accelerator.backward(scores.log_probs.sum() * 0)
                        continue
                    device = scores.mask.device
                    weights = [drawn[i][2] for i in part]
                    weighted = any(weight != 1 for weight in weights)
                    loss = token_loss(
                        scores,
                        torch.tensor([drawn[i][1] for i in part], device=device),
                        counts=inputs["counts"],
                        weights=torch.tensor(weights, device=device) if weighted else None,
                        **self._config.weights,
                    )
                self.accelerator.backward(loss.total)
            each = torch.stack([loss.total, loss.lm, loss.length_norm, loss.unlikelihood])
            terms += each.detach().to(terms)
        return terms

    def _parts_of(self, examples: Sequence[EncodedExample]) -> list[tuple[list[int], int]]:
        """What is computed at once of a share, and how many passes of the model that is to take.

        Each pass of a base that is spread is the work of all processes. Where another one has more
        parts, as many are made here, of no example.
        """
        max_tokens = self._config.max_tokens
        parts = list(example_batches(self._base, examples, max_tokens))
        if not self._is_spread:
            return [(part, 0) for part in parts]
        passes = [
            count_passes(self._base, [examples[i] for i in part], max_tokens) for part in parts
        ]
        most = map(max, zip_longest(*processes().gather(passes), fillvalue=0))
        return list(zip_longest(parts, most, fillvalue=[]))  # type: ignore[arg-type]

    def _add_up(self) -> None:
        """Sum up what the processes have computed of a step: gradients, the loss and its terms."""
        trained = [value for group in self.optimizer.param_groups for value in group["params"]]
        processes().add_gradients(trained, self._terms)

    @property
    def _last_step(self) -> int:
        """The last step's number, by the losses so far."""
        return int(self.args.max_steps if self._plateau is None else self._plateau.last_step)

    def _follow_loss(self) -> None:
        if self._plateau is not None:
            self._plateau.follow(
                [step.loss for step in self.history], [step.length_norm for step in self.history]
            )

    def _trained_values(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer changes, each with its name for messages."""
        named = {
            id(vector): f"the vector of {module!r}"
            for name in self.model.active_adapters
            for module, vector in self.model.vectors(name).items()
        }
        return [
            (named.get(id(value), repr(name)), value)
            for name, value in self.model.named_parameters()
            if value.requires_grad
        ]

    def _check_gradients(self, step: int) -> None:
        """Before they are clipped: one that is not finite would make all of them so."""
        if self.accelerator.scaler is not None:
            return  # it leaves out such a step itself, and lowers its scale
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if math.isfinite(norm):
            return
        what = f"the gradients' norm is {float(norm)}"
        for name, value in self._trained_values():
            if value.grad is not None and not value.grad.isfinite().all():
                what = f"the gradient of {name} is not finite"
                break
        raise self._diverged(step, what)

    def _diverged(self, step: int, what: str) -> DivergedError:
        self.model.zero_grad()  # nothing of this step is left for another one
        return DivergedError(step, what)

    def check_finite(self) -> None:
        """Raise `DivergedError` where a vector is not finite any more."""
        for name in self.model.active_adapters:
            for module, vector in self.model.vectors(name).items():
                if not torch.isfinite(vector).all():
                    what = f"the vector of {module!r} is not finite"
                    raise DivergedError(self.history[-1].step, what)

    def is_world_process_zero(self) -> bool:
        """Whether this process is the one of its job that writes: the Trainer's callbacks ask."""
        return processes().is_first

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Whether training ends here is what the first process's callbacks say.
        self.control = processes().from_first(lambda: self.control)
        asks_callbacks = self.control.should_log or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if asks_callbacks:
            self.control = processes().from_first(lambda: self.control)

    # -- checkpoints ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint of this run: a folder, or `True` for any last one.

        Raises:
            DivergedError: the loss, a gradient or an update is not finite. The vectors are then
                those before that step.
            IA3Error: the checkpoint is another run's.
            BrokenFileError: a file of the checkpoint is damaged.
            StateError: another process writes its checkpoints into the folder.
        """
        with ExitStack() as self._until_end:
            self._staging = None
            if self.args.save_strategy != "no":
                processes().from_first(self._staged)
            if self._threads is not None:
                self._until_end.enter_context(self._threads)
            return self._train(resume_from_checkpoint, **kwargs)

    def _staged(self) -> Path:
        """The hidden folder of this run, which is there where a checkpoint may be written."""
        if self._staging is None:  # or a callback wants one, whatever the arguments say
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._staging = self._until_end.enter_context(_staging_folder(folder))
        return self._staging

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        last = resume_from_checkpoint
        if last is True:
            last = processes().from_first(self._last_checkpoint)
            if last and not Path(last).is_dir():
                raise StateError(
                    f"{last} is not there in process {processes().rank}: processes on several "
                    "machines need a folder of checkpoints that all of them see"
                )
        if last:
            self.history[:], threads = self._read_run(Path(last))
            self._follow_loss()
            if self._threads is not None and threads is not None:
                self._threads.keep(threads)
            done = len(self.history)
            if done >= self._last_step:
                # The Trainer would go on to the end of the epoch.
                self._load_from_checkpoint(last)
                return TrainOutput(done, self.history[-1].loss, {})
        return super().train(resume_from_checkpoint=last, **kwargs)

    def _last_checkpoint(self) -> str | None:
        folder = self.args.output_dir
        last: str | None = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if last and self.args.save_strategy != "no":
            # Killed after a checkpoint was written, a run has left the ones before it.
            self._remove_old()
        return last

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_into or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and rename it into it; the first process does."""
        self.check_finite()
        if not processes().is_first:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = self._staged()
        written, place = staging / name, Path(self.args.output_dir) / name
        self._writes_into = staging
        try:
            super()._save_checkpoint(model, trial)
            run: dict[str, Any] = {
                "run": self._run,
                "history": [asdict(step) for step in self.history],
            }
            if self._threads is not None:
                run["threads"] = self._threads.count
            content = json.dumps({**run, "files": _hashes(written)})
            (written / RUN_NAME).write_text(content, "utf-8")
            _sync(written)
            if place.exists():
                self._remove(place)
            written.rename(place)
            _sync(place.parent, inside=False)
        except OSError as error:
            # The caller does not know the temporary folder's name.
            raise OSError(error.errno, error.strerror, str(place)) from error
        except RuntimeError as error:
            if not _is_of_torchs_writer(error):
                raise
            # It does not tell why it could not write.
            raise OSError(errno.EIO, "torch could not write it", str(place)) from error
        finally:
            self._writes_into = None
            shutil.rmtree(written, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            for old in sort_checkpoints(self.args.output_dir)[:-limit]:
                self._remove(Path(old))

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint; a kill leaves no part of it under its name."""
        aside = self._staged() / uuid.uuid4().hex
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.history[:], _ = self._read_run(Path(resume_from_checkpoint))
        for name in self.model.active_adapters:
            folder = Path(resume_from_checkpoint) / ("" if name == DEFAULT_ADAPTER else name)
            self.model.load_adapter(folder, name, is_trainable=True)

    def _read_run(self, checkpoint: Path) -> tuple[list[TrainingStep], int | None]:
        """The steps before a checkpoint, and their threads; it is whole, and of this run."""
        path = checkpoint / RUN_NAME
        if not path.is_file():
            problem = f"no checkpoint of a T-Few run: it has no {RUN_NAME}; give another folder"
            raise IA3Error(f"{checkpoint} is {problem}")
        advice = f"remove {checkpoint} to go on from the one before it, or to begin anew"
        try:
            read = parse_object(path.read_bytes(), str(path))
            run, hashes = read.get("run", {}), read.get("files", {})
            if not isinstance(run, dict) or not isinstance(hashes, dict):
                raise BrokenFileError(f"{path}: 'run' and 'files' are to be objects")
            steps = steps_of(TrainingStep, read.get("history"), f"{path}: 'history'")
            threads = threads_kept(read.get("threads"), f"{path}: 'threads'")
        except BrokenFileError as error:
            raise BrokenFileError(f"{error}; {advice}") from error
        for name, value in self._run.items():
            had = run.get(name)
            if had != value:
                what = f"{name}={had!r}, this one {value!r}"
                what = f"other {name}" if name in DIGESTS else what
                advice = "give another folder, or remove this one to begin anew"
                raise IA3Error(f"{checkpoint} is another run's: it had {what}; {advice}")
        # Earlier versions wrote no hashes, and a callback may have put files of its own here.
        there = _hashes(checkpoint) if hashes else {}
        for name in sorted(hashes):
            if hashes[name] != there.get(name):
                problem = "is not as it was written: it is damaged, gone or another"
                raise BrokenFileError(f"{checkpoint / name} {problem}; {advice}")
        return steps, threads


@dataclass
class _AtPlateau(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the plateau's last step, as the Trainer does after the bound's."""

    plateau: Plateau

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.plateau.last_step:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"


class _LastGood(TrainerCallback):  # type: ignore[misc]
    """Takes an update back after which a value is not finite."""

    def __init__(self, trainer: TFewTrainer) -> None:
        self._trainer = trainer
        self._trained: list[tuple[str, nn.Parameter]] = []
        self._before: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trained = self._trainer._trained_values()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = [value.detach().clone() for _, value in self._trained]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = [value.detach() for _, value in self._trained]
        # Not kept over the next step, as they take memory where whole modules are trained.
        before_step, self._before = self._before, []
        # The largest value, as one number: it is not finite where any is not.
        if math.isfinite(nn.utils.get_total_norm(values, norm_type=math.inf)):
            return
        name = next(name for name, value in self._trained if not value.isfinite().all())
        for value, before in zip(values, before_step, strict=True):
            value.copy_(before)
        self._trainer.history.pop()
        raise self._trainer._diverged(state.global_step + 1, f"{name} is not finite any more")


@dataclass
class _OnStep(TrainerCallback):  # type: ignore[misc]
    history: list[TrainingStep]
    on_step: Callable[[TrainingStep], None]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.on_step(self.history[-1])
        except StopTraining:
            control.should_training_stop = True


@contextmanager
def _staging_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in one of checkpoints, held by its lock; those of dead processes are removed.

    Not the folder of checkpoints itself is held: a callback may save into it.

    Raises:
        StateError: there is one of a living process.
    """
    with ExitStack() as held:
        try:
            beside = new_folder_beside(folder / PREFIX_CHECKPOINT_DIR, alone=True)
            own = held.enter_context(beside)
        except BlockingIOError as error:
            problem = "another process trains with these checkpoints"
            raise StateError(f"{folder}: {problem}; wait for its end, or give another") from error
        yield own


def _is_of_torchs_writer(error: RuntimeError) -> bool:
    """Whether `torch.save` raised this: its messages are those of the C++ library."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return (
        traceback is not None and traceback.tb_frame.f_globals["__name__"] == torch.save.__module__
    )


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Name -> SHA-256 of each file that resuming reads; a person may edit the card."""
    hashes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (RUN_NAME, CARD_NAME):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            hashes[path.relative_to(checkpoint).as_posix()] = digest.hexdigest()
    return hashes


def _sync(folder: Path, *, inside: bool = True) -> None:
    """Have a folder's names on the disk, and all that is in it."""
    for path in (folder, *(folder.rglob("*") if inside else ())):
        if os.name == "nt" and path.is_dir():
            continue  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def described_run(
    base: Fingerprint,
    first_vectors: Sequence[Mapping[str, Tensor]],
    examples: Sequence[TrainingExample],
    config: TFewConfig,
) -> dict[str, Any]:
    """What identifies a run, as values of JSON; `first_vectors` are those of each adapter."""
    recipe = asdict(config)
    # A run that lacked memory may go on in smaller parts.
    del recipe["max_tokens"]
    if not config.stop_at_plateau:
        del recipe["stop_at_plateau"]  # checkpoints of earlier versions have no such setting
    # An example of a mixture may stand at many places.
    different = {id(example): example for example in examples}.values()
    # Checkpoints of earlier versions have no weights.
    data = repr([astuple(each)[: 2 if each.weight == 1 else 3] for each in different])
    start = hashlib.sha256()
    for vectors in first_vectors:
        for module, vector in vectors.items():
            start.update(module.encode())
            start.update(vector.detach().float().cpu().numpy().tobytes())
    return {
        **recipe,
        "examples": hashlib.sha256(data.encode()).hexdigest(),
        "base model": hashlib.sha256(base.to_json().encode()).hexdigest(),
        "first vectors": start.hexdigest(),
    }


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Within the context, what is made of transformers' and accelerate's knows of one process."""
    asked = logging.getLogger(TrainingArguments.__module__)
    level = asked.level
    if is_launched():
        asked.setLevel(logging.ERROR)  # it warns where there is a group that it does not use
    try:
        with unlaunched():
            yield
    finally:
        asked.setLevel(level)


@contextmanager
def _accelerate_restored() -> Iterator[None]:
    """After the context, accelerate knows of the processes of a job what it knew before."""
    from accelerate import state as of_accelerate  # type: ignore[import-untyped]

    kinds = ("PartialState", "AcceleratorState", "GradientState")
    states = [getattr(of_accelerate, kind)._shared_state for kind in kinds]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state.clear()
            state.update(known)


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """After the context, the global random states are what they were before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
