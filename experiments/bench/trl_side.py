"""TRL's side of a benchmark: its own trainer and training loop on the benchmark's workload.

Imports torch and TRL: import this module only where they are installed. Everything that would slow
TRL down without need is off: activation checkpointing, mixed precision, logging, saving, and
old-policy log-probs, which equal the new ones in a step of one update.
"""

import pathlib
import time
import warnings
from collections.abc import Generator

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from experiments.bench import workload as workloads
from experiments.bench.workload import Workload

SIDE = "trl"


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that records when its step generates and when its update begins."""

    generation = 0.0
    update_began = None

    def compute_loss(self, *args, **kwargs):
        if self.update_began is None:
            self.update_began = time.perf_counter()
        return super().compute_loss(*args, **kwargs)

    def time_generation(self) -> None:
        """Wraps the model's `generate` from now on."""
        generate = self.model.generate

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                self.generation += time.perf_counter() - started

        self.model.generate = timed

    def take_phases(self) -> dict[str, float]:
        """Returns the seconds of the step that ends now, and starts afresh."""
        phases = {"generation": self.generation, "update": time.perf_counter() - self.update_began}
        self.generation, self.update_began = 0.0, None
        return phases


class _Turns(TrainerCallback):
    """Yields control after each step, until the turns are over."""

    def __init__(self, turns: Generator[None, dict[str, float], None]):
        self._turns, self.trainer = turns, None

    def on_train_begin(self, args, state, control, **kwargs):
        self._advance(control, lambda: next(self._turns))

    def on_step_end(self, args, state, control, **kwargs):
        phases = self.trainer.take_phases()
        self._advance(control, lambda: self._turns.send(phases))

    def _advance(self, control, move):
        try:
            move()
        except StopIteration:
            control.should_training_stop = True


def run(
    workload: Workload,
    folder: pathlib.Path,
    turns: Generator[None, dict[str, float], None],
    *,
    steps: int,
    microbatches: int,
    seed: int,
) -> None:
    """Trains for `steps` steps in TRL's loop, yielding to `turns` between them.

    Raises:
      RuntimeError: a step did not do all the work.
    """
    callback = _Turns(turns)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # TRL's own defaults use names that transformers is about to drop.
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = _trainer(
            workload, folder, callback, steps=steps, microbatches=microbatches, seed=seed
        )
        callback.trainer = trainer
        before = trainer.model.get_input_embeddings().weight.detach().clone()
        trainer.train()
    if torch.equal(before, trainer.model.get_input_embeddings().weight):
        raise RuntimeError("TRL's parameters have not moved")


def _trainer(workload, folder, callback, *, steps, microbatches, seed):
    trainer = TimedTrainer(
        model=str(folder / workloads.MODEL),
        reward_funcs=parity_reward(workload),
        args=_arguments(workload, folder, steps=steps, microbatches=microbatches, seed=seed),
        # The same prompts in every step, and one epoch for all steps.
        train_dataset=Dataset.from_dict({"prompt": workloads.prompt_texts(folder) * steps}),
        processing_class=_tokenizer(folder),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.time_generation()
    return trainer


def parity_reward(workload: Workload):
    """Returns a reward of 1 if the last token is even; refuses incomplete responses."""

    def parity(completion_ids, **kwargs):
        lengths = {len(tokens) for tokens in completion_ids}
        if len(completion_ids) != workload.responses or lengths != {workload.response_length}:
            raise RuntimeError(f"TRL made {len(completion_ids)} responses of lengths {lengths}")
        return [float(tokens[-1] % 2 == 0) for tokens in completion_ids]

    return parity


def _arguments(workload, folder, *, steps, microbatches, seed):
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=workload.dtype == "bfloat16",
        max_steps=steps,
        per_device_train_batch_size=workload.responses // microbatches,
        gradient_accumulation_steps=microbatches,
        num_generations=workload.group,
        max_completion_length=workload.response_length,
        loss_type="luspo",
        importance_sampling_level="sequence",
        epsilon=workloads.CLIP_LOW,
        epsilon_high=workloads.CLIP_HIGH,
        learning_rate=workloads.LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _tokenizer(folder):
    """Returns the workload's tokenizer plus an end token beyond the vocabulary, as TRL needs."""
    tokenizer = AutoTokenizer.from_pretrained(folder / workloads.MODEL)
    tokenizer.add_special_tokens({"eos_token": workloads.END})
    tokenizer.pad_token_id = 0
    return tokenizer
