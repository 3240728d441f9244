"""`mopl generate`: answers at any trade-off, and at any distance from the reference, without training."""

import argparse
from typing import Any

from mopl._lines import texts_of_arguments
from mopl._terminal import json_line, say
from mopl.commands.tuned_model import add_model_command, load_reference, load_tuned_model

EXAMPLES = """
examples:
  one prompt, at weights for the objectives in the run's order:
    mopl generate RUN --weights 0.7 0.3 "How do I make tea?"
  closer to the model before training:
    mopl generate RUN --weights 0.7 0.3 --scale 2 "How do I make tea?"
  eight samples, re-ranked exactly:
    mopl generate RUN --weights 0.7 0.3 --scale 2 --candidates 8 "Hello"
  two prompts, sampled:
    mopl generate RUN --weights 0.7 0.3 --temperature 0.8 --seed 1 "Hi" "Bye"
  a larger model of the same tokenizer, guided by the small one:
    mopl generate RUN --weights 0.7 0.3 --guided-model LARGE "Hello"
  a prompt from standard input:
    echo "How do I make tea?" | mopl generate RUN --weights 0.7 0.3 -
"""
SCALE_HELP = (
    "c > 0: above 1 closer to the reference, below 1 beyond the tuned model (default: 1). It is exact on whole "
    "responses, by which --candidates are re-ranked, and approximate per token, by which responses are generated"
)

GUIDED_HELP = (
    "a larger model of the same tokenizer, by directory or hub name, that answers in the place of RUN's model, guided "
    "by what that learned, at --weights: log-probabilities of MODEL, plus 1/c of what training changed. Each token "
    "costs one pass of MODEL and two of RUN's model. As --scale, it is exact on whole responses, approximate per token"
)


def add_parser(commands: Any) -> None:
    """Add `mopl generate` to the commands."""
    help = "answer prompts at any trade-off, without training"
    parser = add_model_command(commands, "generate", run, help, EXAMPLES)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="texts to answer; - reads one from stdin")
    parser.add_argument("--scale", type=float, default=1.0, metavar="C", help=SCALE_HELP)
    parser.add_argument("--guided-model", metavar="MODEL", help=GUIDED_HELP)
    parser.add_argument("--candidates", type=int, default=1, metavar="N",
                        help="sample N responses and re-rank them as whole responses (default: 1)")  # fmt: skip
    parser.add_argument("--rerank", choices=("best", "resample"), default="best", help="best: the most probable at "
                        "--scale; resample: one of them, drawn as at --scale (default: best)")  # fmt: skip
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="maximum number of tokens of a response (default: 128)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="sampling temperature; without it and "
                        "--top-p, decoding is greedy")  # fmt: skip
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable tokens of this mass")
    parser.add_argument("--seed", type=int, help="random seed for sampling (default: a new one each time)")
    template = parser.add_mutually_exclusive_group()
    template.add_argument("--chat", dest="template", action="store_const", const="chat", help="write the prompt with "
                          "the tokenizer's chat template (default: as in training)")  # fmt: skip
    template.add_argument("--raw", dest="template", action="store_const", const="plain",
                          help="let the model continue the prompt as it is")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, with all candidates")


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl generate`."""
    prompts = texts_of_arguments(arguments.prompts)
    if not prompts:
        raise ValueError("there is no prompt; write one at the end, or - to read it from stdin")
    import torch

    from mopl.language_models import models
    from mopl.language_models.generate import generate
    from mopl.language_models.guiding import check_same_tokenizer
    from mopl.language_models.tokenization import ListTokenizer

    device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu"
    tuned = load_tuned_model(arguments, device)
    beta = arguments.beta or tuned.beta
    tokenizer = tuned.tokenizer
    if arguments.template is not None:
        if arguments.template == "chat" and not tokenizer.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {arguments.run} has no chat template; leave out --chat")
        tokenizer = ListTokenizer(tokenizer.tokenizer, max_length=None, template=arguments.template, append_eos=False)
    reference = None
    guided = arguments.guided_model
    if tuned.reference is not None and (arguments.scale != 1 or beta is not None or guided is not None):
        reference = load_reference(tuned, device)
    large = None
    if guided is not None:
        check_same_tokenizer(tokenizer.tokenizer, models.load_tokenizer(guided), f"the tokenizer of {guided}")
        large = models.load_causal_lm(guided).to(device)
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p")}
    answers = generate(
        tuned.model, tokenizer, prompts, arguments.weights if tuned.takes_weights else None, scale=arguments.scale,
        beta=beta, reference=reference, guided_model=large, max_new_tokens=arguments.max_new_tokens,
        candidates=arguments.candidates, rerank=arguments.rerank, text_prompt=tuned.text_prompt, seed=arguments.seed,
        **{name: value for name, value in sampling.items() if value is not None},
    )  # fmt: skip
    for number, answer in enumerate(answers):
        if arguments.json:
            say(json_line(_as_record(answer)))
            continue
        if len(answers) > 1:
            say(*([""] if number else []), f"> {answer.prompt}")
        print(answer.text)


def _as_record(answer: Any) -> dict[str, Any]:
    record = {"prompt": answer.prompt, "text": answer.text, "finished": answer.finished}
    if answer.candidates:
        names = ["text", "log_prob", "reference_log_prob", "score", "share"]
        names += ["guided_log_prob"] if answer.candidates[0].guided_log_prob is not None else []
        record["effective_samples"] = answer.effective_samples
        record["candidates"] = [{name: getattr(one, name) for name in names} for one in answer.candidates]
    return record
