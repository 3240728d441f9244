"""The settings of `mopl clp` in one dataclass: checked before anything is read, loaded or written."""

from typing import TYPE_CHECKING, Any, Literal

from mopl._counted import counted
from mopl.experiments.applications import APPLICATIONS
from mopl.experiments.common_settings import LanguageModelSettings
from mopl.experiments.resume_settings import located, located_inside
from mopl.experiments.settings import in_data, in_evaluation, in_method, in_model, in_training, setting, settings

if TYPE_CHECKING:
    from mopl.language_models.tokenization import ListTokenizer

METHODS = APPLICATIONS["clp"].methods
TRAINED = ("clp", "rewarded-soups", "prompting")
ALL = "clp-all"


@settings
class ClpConfig(LanguageModelSettings):
    """Settings of a run of CLP. Every default is ours: the full text of the paper was not at hand."""

    data: str = setting(
        help='prompts: a text file with one per line, JSON lines with "prompt", or preference data, whose prompts are '
        "used",
        missing="name prompts, a path or a name on the Hugging Face hub",
        kw_only=False,
    )
    limit: int | None = setting(None, "maximum number of prompts to take", at_least=2)
    max_prompt: int = in_data(
        512, "maximum number of tokens of a prompt; longer ones are left out", at_least=1, metavar="TOKENS"
    )
    rewards: tuple[str, ...] = in_data(
        (),
        "names of `mopl.rewards`, with options as in length:target=20, or module:function of (texts, prompts); their "
        "names are the objectives, in the order of the weights. classifier:directory=DIR is a reward for each output",
        missing="name at least one of mopl.rewards, or module:function",
        convert=located_inside,
        metavar="REWARD",
    )
    normalize: Literal["base", "running", "none"] = in_training(
        "base",
        "train on rewards with mean 0 and standard deviation 1 over answers of the untrained model; running: and over "
        "those of the training so far. Fronts are always in the rewards' own units",
    )
    normalize_decay: float = in_training(
        1.0,
        "factor on the weight of earlier rewards at each rollout, for normalize running; 0.99 averages over about 100 "
        "rollouts",
        above=0,
        at_most=1,
        metavar="RATE",
    )
    normalize_prompts: int = in_training(
        64,
        "number of prompts that the untrained model answers to set the scale of the rewards",
        at_least=1,
        metavar="PROMPTS",
    )
    method: str = in_method(
        "clp",
        "method to train; clp-all trains and compares all that can be compared",
        choices=(*METHODS, ALL),
        metavar="METHOD",
    )
    scope: str = in_model(
        "attention",
        "which parameters are mixed: full, attention, logits or a pattern of names of parameters (`ParameterMixture`); "
        "lora-mixture: adapters (`LoraMixture`); hyper-prompt: LoRA and virtual tokens, no parameters",
        missing="name what is mixed, such as attention",
    )
    train_shared: bool = in_model(False, "also train what is outside the scope, shared by all trade-offs")
    lora_rank: int = setting(8)
    lora_alpha: float = setting(16.0)
    kl_weight: tuple[float, ...] = in_method(
        (0.05,),
        "α, the weight of the KL to the reference; several: the policy is conditioned on it (`KLWeightCoefficients`), "
        "and the first is that of the front's main points",
        positive=True,
        nonempty=True,
        metavar="WEIGHT",
    )
    kl_form: Literal["complement", "penalty"] = in_method("complement", "(1 - α) w·R - α KL, or w·R - α KL")
    kl_in: Literal["reward", "loss"] = in_method("reward", "whether the KL enters the reward or the loss")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = in_method(
        "k1", "estimator of the KL; exact: over the whole vocabulary at each position, without the logits"
    )
    kl_level: Literal["token", "sequence"] = in_method("token", "whether the KL is taken per token or per sequence")
    baseline: Literal["leave_one_out", "group", "value", "none"] = in_method(
        "leave_one_out",
        "baseline of the policy gradient: over the samples of a prompt, or a learned value of weights and α",
    )
    standardize: bool = in_method(
        False, "divide advantages by the standard deviation of their group, as GRPO does; needs baseline group"
    )
    to_go: bool = in_method(False, "count for each token only the KL from that token on")
    value_learning_rate: float = in_training(1e-3, "learning rate of the value head", positive=True, metavar="RATE")
    concentration: float = setting(1.0)
    trade_offs: int | None = in_training(
        None,
        "number of distinct trade-offs in a step",
        unset="2 where parameters are mixed, else one for each prompt; one for each objective with share_rollouts",
        at_least=1,
        metavar="N",
    )
    share_rollouts: bool = in_training(
        False,
        "answer each prompt at trade-offs drawn from those of the step, and let each answer count at all of them, by "
        "importance weights (`balance_weights`): less noise from the same number of answers, for one forward pass over "
        "all of them at each trade-off. Not with baseline group; no effect on the experts of rewarded-soups",
    )
    steps: int = in_training(200, "optimizer steps of each trained model", at_least=1)
    prompts_per_step: int = in_training(8, "prompts per rollout", at_least=1, metavar="N")
    samples_per_prompt: int = in_training(4, "samples per prompt, all at one trade-off", at_least=1, metavar="N")
    epochs: int = in_training(1, "optimizer steps on each rollout; more than one needs clip", at_least=1, metavar="N")
    clip: float | None = in_training(
        None, "ε of the clipped importance ratio, with several epochs", unset="none", positive=True, metavar="EPSILON"
    )
    ratio_level: Literal["token", "sequence", "sequence_mean"] = in_training(
        "token", "whether importance ratios are taken per token or per sequence"
    )
    max_new_tokens: int = in_training(64, "maximum number of tokens of a response", at_least=1, metavar="TOKENS")
    temperature: float = in_training(
        1.0,
        "divides the logits of policy and reference, in sampling, log-probabilities and evaluation",
        positive=True,
        metavar="T",
    )
    rollout_server: str | None = in_training(
        None,
        "address of a server that samples the answers of the training: `mopl serve MODEL --policies FOLDER`, or vLLM; "
        "its key is in MOPL_API_KEY",
        unset="none, the policy itself samples",
        metavar="URL",
    )
    rollout_folder: str | None = in_training(
        None,
        "folder in which the policy is written for rollout_server at each step; the server must see it",
        unset="none",
        convert=located,
        metavar="FOLDER",
    )
    rollout_timeout: float = in_training(
        600.0, "longest time for a request to rollout_server, retries included", positive=True,
        metavar="SECONDS",
    )  # fmt: skip
    importance_level: Literal["sequence", "token"] = in_training(
        "sequence",
        "what gets an importance weight π/μ, the policy's probability over that of rollout_server: answers, or tokens "
        "(`importance_weights`)",
    )
    importance_cap: float = in_training(
        2.0, "largest importance weight of what rollout_server sampled", at_least=1, metavar="CAP"
    )
    engine_kl_limit: float = in_training(
        0.1,
        "stop if the mean KL per token from rollout_server to the policy exceeds this, since the server then has "
        "another model; 0 for never",
        at_least=0,
        metavar="NATS",
    )
    rows_at_once: int = in_training(64, "maximum number of responses generated at once", at_least=1, metavar="N")
    accumulation: int = setting(1, "number of parts in which a step's prompts are processed; the samples depend on it")
    learning_rate: float = setting(1e-4, "learning rate of the policy")
    warmup: int = setting(0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "float32", "data type of the model; what is mixed is trained in it"
    )
    kl_limit: float = in_training(
        100.0, "stop if the mean KL of a step's responses exceeds this; 0 for never", at_least=0, metavar="NATS"
    )
    entropy_floor: float = in_training(
        1e-3, "stop if the mean entropy per token stays below this; 0 for never", at_least=0, metavar="NATS"
    )
    patience: int = in_training(
        10,
        "number of rollouts with too little entropy, or with equal rewards, before training stops",
        at_least=1,
        metavar="N",
    )
    reference_point: tuple[float, ...] = setting(
        (), unset="mean of the untrained model's rewards minus twice their standard deviation", metavar="REWARD"
    )
    eval_prompts: int = in_evaluation(
        64, "maximum number of held-out prompts that are answered to measure the front", at_least=1, metavar="N"
    )
    eval_samples: int = in_evaluation(
        1, "number of answers to each held-out prompt at every trade-off", at_least=1, metavar="N"
    )
    samples: int = setting(3, "number of held-out prompts whose answers the report shows")
    log_samples: int = setting(
        4, "number of responses that samples.jsonl keeps of a rollout, every log_every steps", at_least=0, metavar="N"
    )
    checkpoint_every: int = setting(100, at_least=1)

    def check_together(self) -> None:
        """Raise if two settings do not go together."""
        super().check_together()
        if len(set(self.kl_weight)) != len(self.kl_weight):
            raise ValueError(f"kl_weight is {self.kl_weight} but must be one number or several different ones")
        if self.kl_form == "complement" and not max(self.kl_weight) < 1:
            raise ValueError(
                f"kl_weight is {max(self.kl_weight):g} but rewards count 1 - α in the complement form; stay below 1, "
                "or pass kl_form='penalty'"
            )
        if self.trade_offs is not None and self.trade_offs > self.prompts_per_step and not self.share_rollouts:
            raise ValueError(
                f"trade_offs is {self.trade_offs} but a step has {counted(self.prompts_per_step, 'prompt')}, each at "
                "one trade-off; take fewer, or more prompts_per_step"
            )
        if self.baseline in ("leave_one_out", "group") and self.samples_per_prompt < 2:
            raise ValueError(
                f"baseline {self.baseline!r} averages over a prompt's samples, of which there is one; raise "
                "samples_per_prompt, or take baseline='value'"
            )
        if self.share_rollouts and (self.baseline == "group" or self.trade_offs == 1):
            wrong = "trade_offs 1" if self.trade_offs == 1 else "baseline 'group'"
            remedy = "raise trade_offs" if self.trade_offs == 1 else "take baseline='leave_one_out'"
            raise ValueError(
                f"share_rollouts lets an answer count at several trade-offs, which {wrong} does not go with; {remedy}, "
                "or leave share_rollouts out"
            )
        if self.share_rollouts and self.rollout_server is not None and self.importance_level == "token":
            raise ValueError(
                "share_rollouts weighs whole answers; take importance_level='sequence' for those of rollout_server"
            )
        if self.share_rollouts and self.method == "rewarded-soups":
            raise ValueError(
                "share_rollouts is about one policy at several trade-offs, but rewarded-soups trains an expert for "
                "each objective; leave share_rollouts out, or take method='clp' or 'clp-all'"
            )
        if self.standardize and self.baseline != "group":
            raise ValueError("standardize divides by a group's deviation; it needs baseline='group'")
        if self.normalize_decay != 1 and self.normalize != "running":
            raise ValueError("normalize_decay is about a scale that follows the rewards; pass normalize='running'")
        if self.kl_estimator == "exact" and self.kl_level != "token":
            raise ValueError("kl_estimator 'exact' is of each position; kl_level='sequence' is for k1, k2 and k3")
        if self.epochs > 1 and self.clip is None:
            raise ValueError(f"epochs is {self.epochs}; updates on old samples need clip, such as clip=0.2")
        if self.epochs == 1 and (self.clip is not None or self.ratio_level != "token"):
            raise ValueError("clip and ratio_level are about several epochs on a rollout; raise epochs, or leave them")
        if self.ratio_level != "token" and self.to_go:
            raise ValueError("to_go gives tokens advantages of their own, which a sequence's ratio cannot weigh")
        if set("@?#") & set(self.rollout_server or ""):  # not shown: it may be a password
            raise ValueError(
                "rollout_server has an @, a ? or a #, so a user, a password or options, which config.json would keep; "
                "give the address alone, such as http://127.0.0.1:8000, and put a key into MOPL_API_KEY"
            )
        if (self.rollout_server is None) != (self.rollout_folder is None):
            given, missing = ("server", "folder") if self.rollout_folder is None else ("folder", "server")
            shown = self.rollout_folder if self.rollout_server is None else self.rollout_server
            raise ValueError(
                f"rollout_{given} is {shown} but there is no rollout_{missing}; the policy "
                "is written into rollout_folder for rollout_server, so pass both or neither"
            )
        defaults = type(self).__dataclass_fields__
        for name in ("importance_level", "importance_cap", "engine_kl_limit", "rollout_timeout"):
            if self.rollout_server is None and (value := getattr(self, name)) != defaults[name].default:
                raise ValueError(
                    f"{name} is {value} but it is about answers of a rollout_server, and there is none; pass "
                    f"rollout_server and rollout_folder, or leave {name} out"
                )
        for name in ("checkpoint_every", "steps"):
            if (value := getattr(self, name)) % self.epochs:
                raise ValueError(
                    f"{name} is {value} but a rollout serves {self.epochs} steps (epochs); take a multiple of that"
                )
        if self.mixes_parameters and self.adapter_options:
            raise ValueError(
                f"{self.adapter_options[0]} is about adapters, which scope={self.scope!r} has none of; pass "
                "scope='lora-mixture' or 'hyper-prompt'"
            )
        if self.scope == "hyper-prompt" and self.conditions_on_kl and {"clp", "dera"} & set(self.methods):
            raise ValueError(
                "scope 'hyper-prompt' takes weights alone, so several kl_weight cannot be asked for; pass one, or "
                "another scope"
            )
        if self.method == "dera" and not self.conditions_on_kl:
            raise ValueError("dera answers for other KL weights than the first; pass several in kl_weight")

    @property
    def conditions_on_kl(self) -> bool:
        """Whether the policy is asked for several KL weights."""
        return len(self.kl_weight) > 1

    def trade_offs_of(self, kind: str, objectives: int) -> int:
        """Return how many distinct trade-offs a step of a kind of policy has."""
        if self.trade_offs is not None:
            return self.trade_offs
        if self.share_rollouts:
            return max(2, objectives)
        return 2 if kind == "clp" and self.mixes_parameters else self.prompts_per_step

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose fronts the run has."""
        if self.method != ALL:
            return (self.method,)
        return tuple(name for name in METHODS if name != "dera" or self.conditions_on_kl)

    @property
    def mixes_parameters(self) -> bool:
        """Whether a trade-off is a sum of whole parameters, so that each one needs a run of its own."""
        return self.scope not in ("lora-mixture", "hyper-prompt")

    def list_tokenizer(self, tokenizer: Any) -> "ListTokenizer":
        """Return how the run turns prompts into tokens."""
        from mopl.language_models.tokenization import ListTokenizer

        return ListTokenizer(tokenizer, max_length=None, template=self.template, append_eos=False)

    @property
    def baseline_scope(self) -> str:
        """What experts and the prompting baseline train: the same parameters, but no virtual tokens."""
        return "lora-mixture" if self.scope == "hyper-prompt" else self.scope

    def scope_of(self, kind: str) -> str:
        """Return what a policy of a kind trains."""
        return self.scope if kind == "clp" else self.baseline_scope

    def kl_weights(self, kind: str) -> tuple[float, ...]:
        """Return the KL weights that a policy answers for: all of them, or the first alone."""
        return self.kl_weight if kind in ("clp", "prompting") else self.kl_weight[:1]
