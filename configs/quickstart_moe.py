"""The quickstart on a mixture of experts: a Qwen3-MoE of 8 experts a layer, of which a token takes 2.

Command : python -m experiments.train --config=configs/quickstart_moe.py --workdir=/tmp/moe
Hardware: two CPU cores
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.path = "embedded:label_sums_moe"
    return config
