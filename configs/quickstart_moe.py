"""The quickstart on a mixture of experts: a Qwen3-MoE, 8 experts a layer and 2 a token.

Command : python -m experiments.train --config=configs/quickstart_moe.py --workdir=/tmp/moe
Hardware: two CPU cores
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.path = "embedded:label_sums_moe"
    return config
