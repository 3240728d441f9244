"""`mopl clp`: policies trained on rewards for every trade-off, and what they are compared with."""

from collections.abc import Mapping
from typing import Any

from mopl.clp.config import TRAINED, ClpConfig
from mopl.commands.experiment import TRUST_REMOTE_CODE, Demo, Experiment, Tell, ask_or_serve

EXAMPLES = """
examples:
  a small model, prompts and two rewards, about 15 minutes on two cores:
    mopl clp --demo
  prompts and built-in rewards:
    mopl clp --model MODEL --data prompts.jsonl --rewards sentiment brevity
  rewards of your own, beside the baselines:
    mopl clp --model MODEL --data prompts.txt \\
        --rewards module:function length:target=20 --method clp-all
  settings from a file, which options override:
    mopl clp --config short.yaml --steps 500
  continue after Ctrl-C or a crash:
    mopl clp --run runs/short --resume --trust-rewards
"""


def _demo(settings: Mapping[str, Any], tell: Tell) -> Demo:
    from mopl.clp.demo import RUN, demo_settings

    made = {**demo_settings(tell), **settings}
    return Demo(made, RUN if made.get("method", "clp") == "clp" else f"{RUN}-{made['method']}")


CLP = Experiment(
    name="clp",
    help="train a language model on rewards, for every trade-off",
    examples=EXAMPLES,
    settings=ClpConfig,
    recipe="mopl.clp.recipe",
    train="train_policies",
    folder="runs/METHOD-DATA-N",
    basic=(
        "model",
        "data",
        "rewards",
        "method",
        "scope",
        "kl_weight",
        "steps",
        "prompts_per_step",
        "samples_per_prompt",
        "max_new_tokens",
        "learning_rate",
        "points",
        "seed",
        "device",
    ),
    hint=lambda run: ask_or_serve(run) if run.method_name in TRAINED else (),
    needed=("model", "data", "rewards"),
    missing="pass --model, --data with prompts and --rewards, or --demo",
    demo=_demo,
    options={
        **TRUST_REMOTE_CODE,
        ("data", "--trust-rewards"): {
            "action": "store_true",
            "help": "with --resume: import the modules that the run names for its rewards; without it name them again "
            "with --rewards",
        },
    },
    on_resume=("trust_rewards",),
)
