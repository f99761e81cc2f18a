"""The quickstart's control: the same run, rewarded for the answer's form, not its correctness.

Command : python -m experiments.train --config=configs/quickstart_format.py --workdir=/tmp/format
Hardware: two CPU cores
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    # The verifier stays in the reward with weight 0, so that accuracy is still measured.
    config.reward.parts = {"gsm8k": 0.0, "format": 1.0}
    config.eval.metric = "gsm8k"
    config.reward.options = {"format": {"name": "gsm8k_line"}}
    return config
