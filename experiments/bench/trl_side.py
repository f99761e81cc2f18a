"""TRL's side of the step's benchmark: its own trainer and training loop.

`python -m experiments.bench.trl_side SPEC`, in an environment with torch and TRL; nothing of
luspo_jax is imported. Everything that would slow TRL down without need is off: activation
checkpointing, mixed precision unless asked for, logging, saving, and old-policy log-probs, which
equal the new ones in a step of one update.
"""

import sys
import time
import warnings

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from experiments.bench import serving

PACKAGES = ("torch", "trl", "transformers", "accelerate", "numpy")
END = "<end>"  # of a model without an end: a token beyond its vocabulary, which TRL needs
_EPOCH = 64  # steps: beginning an epoch costs time


class Lengths(LogitsProcessor):
    """Ends each row with `end` when it has its length, and not before."""

    def __init__(self, lengths, end, width):
        self._lengths_B, self._end, self._width = torch.tensor(lengths), end, width

    def __call__(self, input_ids, scores):
        made = input_ids.shape[1] - self._width
        scores[:, self._end] = -torch.inf
        last_B = (self._lengths_B.to(scores.device) == made + 1).nonzero()[:, 0]
        scores[last_B] = -torch.inf
        scores[last_B, self._end] = 0.0
        return scores


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that records when its step generates and when its update begins."""

    generation = 0.0
    update_began = None

    def compute_loss(self, *args, **kwargs):
        """Notes when the first micro-batch of an update begins."""
        if self.update_began is None:
            self.update_began = time.perf_counter()
        return super().compute_loss(*args, **kwargs)

    def time_generation(self, lengths, end):
        """Wraps the model's `generate` from now on; responses get their lengths, if they end."""
        generate = self.model.generate

        def timed(*args, **kwargs):
            started = time.perf_counter()
            if end is not None:
                width = (args[0] if args else kwargs["input_ids"]).shape[1]
                kwargs["logits_processor"] = LogitsProcessorList([Lengths(lengths, end, width)])
            try:
                return generate(*args, **kwargs)
            finally:
                self.generation += time.perf_counter() - started

        self.model.generate = timed

    def take_phases(self):
        """Returns the seconds of the step that ends now, and starts afresh."""
        phases = {"generation": self.generation, "update": time.perf_counter() - self.update_began}
        self.generation, self.update_began = 0.0, None
        return phases


class Turns(TrainerCallback):
    """Takes a turn before each step, until no more are wanted."""

    def __init__(self):
        self._steps = serving.Steps(**serving.versions(PACKAGES))
        self.trainer, self.lengths, self.checks, self._before = None, (), {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Says what was checked, and waits for the first turn."""
        self._before = self._embedding().clone()
        control.should_training_stop = not self._steps.begin(**self.checks)
        if control.should_training_stop:
            sys.exit()  # the loop takes its first step in any case

    def on_step_end(self, args, state, control, **kwargs):
        """Reports the phases of a step, and waits for the next turn."""
        phases = self.trainer.take_phases()
        control.should_training_stop = not self._steps.end(
            phases, self.lengths, lambda: not torch.equal(self._before, self._embedding())
        )

    def _embedding(self):
        return self.trainer.model.get_input_embeddings().weight.detach()


def train(spec):
    """Trains until no step is wanted."""
    turns = Turns()
    lengths = [n for group in spec["lengths"] for n in group]

    def reward(completions, completion_ids, **kwargs):
        turns.lengths = [len(tokens) for tokens in completion_ids]
        return serving.rewards(completions)

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # TRL's own defaults use names that transformers is about to drop.
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = TimedTrainer(
            model=spec["folder"],
            reward_funcs=reward,
            args=arguments(spec, len(lengths)),
            train_dataset=Dataset.from_dict({"prompt": spec["prompts"] * _EPOCH}),
            processing_class=tokenizer(spec),
            callbacks=[turns],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.time_generation(lengths, spec["end"])
        turns.trainer = trainer
        turns.checks = {
            "logprob": logprob(trainer.model, spec["prompt_tokens"][0]),
            "matmul": matmul_rate(spec["dtype"]),
        }
        trainer.train()


def logprob(model, tokens):
    """Returns the mean log-probability of a prompt's tokens after its first."""
    ids = torch.tensor([tokens], device=model.device)
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None]).mean().item()


def matmul_rate(dtype, size=2048, repeats=5):
    """Returns torch's operations per second of a large square product on the CPU, the best."""
    if torch.cuda.is_available():
        return {}
    seconds, x = [], torch.randn(size, size, dtype=getattr(torch, dtype))
    for _ in range(1 + repeats):  # the first starts the threads
        started = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - started)
    return {"torch": 2 * size**3 / min(seconds)}


def arguments(spec, responses):
    """Returns the trainer's settings."""
    settings = spec["settings"]
    return GRPOConfig(
        output_dir=spec["scratch"],
        seed=spec["seed"],
        use_cpu=not torch.cuda.is_available(),
        bf16=spec["dtype"] == "bfloat16",
        torch_compile=settings["compile"],
        max_steps=10**6,
        per_device_train_batch_size=responses // settings["microbatches"],
        gradient_accumulation_steps=settings["microbatches"],
        num_generations=spec["group"],
        max_completion_length=max(max(group) for group in spec["lengths"]),
        temperature=1.0,
        loss_type="luspo",
        importance_sampling_level="sequence",
        epsilon=spec["clip_low"],
        epsilon_high=spec["clip_high"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def tokenizer(spec):
    """Returns the model's tokenizer, with an end token for a model that has none."""
    found = AutoTokenizer.from_pretrained(spec["folder"], padding_side="left")
    if spec["end"] is None:
        found.add_special_tokens({"eos_token": END})
        found.pad_token_id = 0
    return found


if __name__ == "__main__":
    train(serving.spec(sys.argv[1]))
