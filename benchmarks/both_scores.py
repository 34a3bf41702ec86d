"""Runs a script whose meta-tests are scored twice: eval/return_* with the mean action, eval/sampled_return_* without.

    python benchmarks/both_scores.py gmps.py [flags of the script]

For maml_trpo.py and gmps.py. Scoring changes nothing in training: its episodes are drawn apart.
"""

import importlib
import inspect
import sys
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def both(evaluate):
    """evaluate of a script, with the scores of sampled actions beside those of the mean action."""

    @wraps(evaluate)
    def evaluate_both(*args, **settings):
        call = inspect.signature(evaluate).bind(*args, **settings).arguments
        mean, sampled = (evaluate(**call | {"deterministic": mode}) for mode in (True, False))
        return mean | {f"sampled_{name}": score for name, score in sampled.items()}

    return evaluate_both


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    script.evaluate = both(script.evaluate)
    script.main(script.parse(script.Args, sys.argv[2:]))
