"""Model, prompts and settings of `mopl clp --demo`: the model and the prompts of `mopl align --demo`.

Each prompt asks for an answer in a sentence or two. Without that this model hardly ever ends an answer within the few
tokens that two cores can afford, all answers are equally long, and there is nothing to learn about brevity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mopl import _terminal
from mopl._extras import require_for
from mopl.language_models.demo_model import load_prompts, smollm2, write_lines

FOLDER = "runs/clp-demo-data"
RUN = "runs/clp-demo"
PROMPTS = "prompts.jsonl"
ASKED = "Answer in a sentence or two."

# A small budget, for about fifteen minutes on two cores: sixteen answers a step show that a policy moves and where to,
# not how far it would get.
SETTINGS: dict[str, Any] = {
    "rewards": ("sentiment", "brevity"),
    "method": "clp",
    "scope": "lora-mixture",
    "lora_rank": 8,
    "kl_weight": (0.15,),  # with 0.05 it soon answers in single words that are not always words
    "steps": 32,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "max_new_tokens": 40,
    # At 1 a model of this size is half incoherent before it is trained at all.
    "temperature": 0.7,
    "concentration": 0.5,
    "learning_rate": 5e-4,
    "warmup": 3,
    "schedule": "linear",
    "held_out": 0.15,
    "normalize_prompts": 16,
    "eval_prompts": 16,
    "points": 5,
    "bootstrap": 200,
    "log_every": 4,
    "checkpoint_every": 8,
}


def demo_settings(
    say: Callable[[str], None] = _terminal.say,
    folder: str | Path = FOLDER,
    *,
    model: str | Path | None = None,
    count: int = 160,
) -> dict[str, Any]:
    """Return settings of `ClpConfig` for the demo; its model and prompts are made where they are not there yet.

    Args:
        say: Told about the progress, a line at a time.
        folder: For the prompts.
        model: Directory of another causal language model with a chat template; default SmolLM2-135M-Instruct.
        count: Prompts; all if there are fewer.

    Raises:
        ImportError: If a package of the extra `demo-lm` is missing.
        OSError: If the model cannot be had.
    """
    from mopl.clp.reward_modules import make_rewards

    require_for("align", "peft")  # a missing package shows before anything is made
    make_rewards(SETTINGS["rewards"])
    home = smollm2(say) if model is None else Path(model)
    pool = [prompt for group in load_prompts().values() for prompt in group]
    chosen = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))[:count]]
    file = Path(folder) / PROMPTS
    write_lines(file, ({"prompt": f"{prompt} {ASKED}"} for prompt in chosen))
    return {**SETTINGS, "model": str(home), "data": str(file)}
