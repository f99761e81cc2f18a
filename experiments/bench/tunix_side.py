"""Tunix's side of the step's benchmark: its GRPOLearner and its own ("vanilla") rollout.

`python -m experiments.bench.tunix_side SPEC`, in an environment with google-tunix; nothing of
luspo_jax is imported. The learner's loop stays in charge: it takes a turn where it asks for the
next batch of prompts. There is no reference model, and no old log-probabilities, which equal the
new ones in a step of one update. Parameters and arithmetic are float32, activations are not
recomputed.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout, vanilla_rollout

from experiments.bench import serving

PACKAGES = ("google-tunix", "jax", "flax", "qwix", "numpy", "transformers")


class Tokens:
    """The tokenizer, with ids of padding and end that the model does not sample by itself."""

    def __init__(self, folder, *, pad, end):
        self._tokenizer, self._pad, self._end = AutoTokenizer.from_pretrained(folder), pad, end

    def encode(self, text, **kwargs):
        """Returns the ids of a text, none added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids, **kwargs):
        """Returns the text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def bos_id(self):
        """Returns no id to begin with."""
        return None  # a prompt's own text has one where the model wants one

    def eos_id(self):
        """Returns the id that ends a response."""
        return self._end

    def pad_id(self):
        """Returns the id of padding."""
        return self._pad


class LengthSampler(Sampler):
    """The library's sampler with the lengths of a task: a response ends when it has its length."""

    lengths, banned = None, ()

    def _sample(self, logits, eos, cache, sampler_state):
        made = sampler_state.decoding_step + 1 - sampler_state.num_input_tokens
        token_V = jnp.arange(logits.shape[-1])
        free_V = ~jnp.isin(token_V, jnp.array(self.banned))
        end_V = token_V == self.tokenizer.eos_id()
        over_B = made >= jnp.array(self.lengths)
        allowed_BV = jnp.where(over_B[:, None], end_V, free_V)
        logits = jnp.where(allowed_BV[:, None], logits[:, -1:], -jnp.inf)
        return super()._sample(logits=logits, eos=eos, cache=cache, sampler_state=sampler_state)


def rollout_engine(lengths, banned):
    """Returns the vanilla rollout with a LengthSampler."""

    class Rollout(vanilla_rollout.VanillaRollout):
        def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
            sizes = rollout_actor.config
            cache = CacheConfig(
                cache_size=rollout_config.kv_cache_size,
                num_layers=sizes.num_layers,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
            )
            self._sampler = LengthSampler(rollout_actor, tokenizer, cache)
            self._sampler.lengths, self._sampler.banned = lengths, banned

    return Rollout


def load(folder, mesh):
    """Returns the model of a folder in float32."""
    found = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "num_layers": found["num_hidden_layers"],
        "vocab_size": found["vocab_size"],
        "embed_dim": found["hidden_size"],
        "hidden_dim": found["intermediate_size"],
        "num_heads": found["num_attention_heads"],
        "head_dim": found["head_dim"],
        "num_kv_heads": found["num_key_value_heads"],
        "rope_theta": found["rope_theta"],
        "norm_eps": found["rms_norm_eps"],
    }
    tied = found["tie_word_embeddings"]
    if found["model_type"] == "qwen3":
        config, loader = qwen3.ModelConfig(**sizes, use_tied_embedding=tied), qwen3_params
    elif found["model_type"] == "llama":
        # Tunix 0.1.7's Llama rotates by its function's default, whatever its configuration says.
        llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=found["rope_theta"])
        config, loader = llama.ModelConfig(**sizes, weight_tying=tied), llama_params
    else:
        raise SystemExit(f"{found['model_type']}: not a model of Tunix that is compared here")
    return loader.create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)


class Side:
    """The learner, its turns, and the seconds of its phases."""

    def __init__(self, spec):
        self._spec, self._steps = spec, serving.Steps(**serving.versions(PACKAGES))
        self._phases, self._lengths = {"generation": 0.0}, []
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        self._mesh = mesh
        lengths = [n for group in spec["lengths"] for n in group]
        ends = spec["end"] is not None
        # A model without an end gets ids beyond its vocabulary, which it can neither read nor make.
        vocab = json.loads((pathlib.Path(spec["folder"]) / "config.json").read_text())["vocab_size"]
        pad, end = (spec["pad"], spec["end"]) if ends else (vocab, vocab + 1)
        self._model = load(spec["folder"], mesh)
        self._before = self._embedding()
        with mesh:
            self._checks = {"logprob": self._logprob()}
        longest_prompt, longest = max(map(len, spec["prompt_tokens"])), max(lengths)
        count = len(spec["prompts"])
        training = rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.adamw(spec["learning_rate"], weight_decay=0.0),
            ),
            eval_every_n_steps=2**30,
            max_steps=2**30,
            mini_batch_size=count,
            train_micro_batch_size=count // spec["settings"]["microbatches"],
            rollout_micro_batch_size=count,
            compute_logps_micro_batch_size=count,
        )
        cluster = rl_cluster.RLCluster(
            actor=self._model,
            tokenizer=Tokens(spec["folder"], pad=pad, end=end),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys(
                    (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT),
                    mesh,
                ),
                rollout_engine=rollout_engine(lengths, (pad, end)) if ends else "vanilla",
                training_config=training,
                rollout_config=base_rollout.RolloutConfig(
                    max_tokens_to_generate=longest,
                    max_prompt_length=longest_prompt,
                    kv_cache_size=longest_prompt + longest,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=None,
                ),
            ),
        )
        self._time(cluster)
        self._learner = GRPOLearner(
            rl_cluster=cluster,
            reward_fns=[lambda prompts, completions, **kwargs: serving.rewards(completions)],
            algo_config=algorithm(spec),
        )

    def _logprob(self):
        tokens = jnp.array([self._spec["prompt_tokens"][0]])
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        logits, _ = self._model(tokens, jnp.arange(length)[None], None, causal)
        logprobs = jax.nn.log_softmax(logits[0, :-1].astype(jnp.float32))
        return float(jnp.take_along_axis(logprobs, tokens[0, 1:, None], axis=-1).mean())

    def _time(self, cluster):
        generate, update = cluster.generate, cluster.update_actor

        def timed_generate(*args, **kwargs):
            started = time.perf_counter()
            found = generate(*args, **kwargs)
            self._phases["generation"] += time.perf_counter() - started
            self._lengths += [len(tokens) for tokens in found.tokens]
            return found

        def timed_update(*args, **kwargs):
            self._began = self._began or time.perf_counter()
            return update(*args, **kwargs)

        self._began = None
        cluster.generate, cluster.update_actor = timed_generate, timed_update

    def batches(self):
        """Yields the prompts of each step, as often as one is wanted."""
        wanted = self._steps.begin(**self._checks)
        while wanted:
            self._phases, self._lengths, self._began = {"generation": 0.0}, [], None
            yield {"prompts": np.array(self._spec["prompts"])}
            jax.block_until_ready(jax.tree.leaves(nnx.state(self._model)))
            self._phases["update"] = time.perf_counter() - self._began
            wanted = self._steps.end(self._phases, self._lengths, self._moved)

    def train(self):
        """Trains until no step is wanted."""
        with self._mesh:
            self._learner.train(self.batches())

    def _embedding(self):
        return np.array(self._model.embedder.input_embedding.value)

    def _moved(self):
        return not np.array_equal(self._before, self._embedding())


def algorithm(spec):
    """Returns LUSPO as Tunix can say it: GSPO's ratio, and the sum over a response's tokens."""
    config = GRPOConfig(
        num_generations=spec["group"],
        num_iterations=1,
        beta=0.0,
        epsilon=spec["clip_low"],
        loss_algo="gspo-token",
        loss_agg_mode="seq-mean-token-sum",
    )
    config.epsilon_high = spec["clip_high"]
    return config


if __name__ == "__main__":
    Side(serving.spec(sys.argv[1])).train()
