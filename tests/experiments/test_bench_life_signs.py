"""The bench of signs of life: two real processes, in one try."""

import re
import subprocess
import sys


def test_each_process_tells_the_cost_of_a_beat():
    command = [sys.executable, "-m", "experiments.bench.life_signs", "--beats=3", "--posts=5"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found = re.findall(r"process (\d), posts of 5: (\d+\.\d\d) ms of CPU a beat", ran.stdout)
    assert sorted(index for index, _ in found) == ["0", "1"], ran.stdout
    assert all(0 < float(cost) < 1000 for _, cost in found)
