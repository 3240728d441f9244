"""Models that are mixed while they decode: baselines, and a frozen large model that a small conditioned one guides.

    dera(model, reference, λ, input_ids)       p ∝ p_ref^(1-λ) p^λ       DeRa (Liu et al., ICML 2024)
    logit_mixing(experts, w, input_ids)        p ∝ Π_i p_i^(w_i)         multi-objective decoding (Shi et al., 2024)
    guided(large, policy, w, input_ids)        p ∝ p_L (p_w / p0)^λ      a small model guides a large one at any w

Each next token is drawn from the normalised mixture (`mopl.steering`). Every model runs on every token, with a cache of
its own, so m experts cost m times one, where a conditioned model (`mopl.conditioning.ParameterMixture`) costs one. What
`guided` costs is one pass of the large model and two of the small one; what it is the optimum of, `mopl.steering` says.

The mixtures of *whole responses* are what the theory is about: exact experts give the exact optimum of Σ_i w_i R_i, and
λ = κ(α')/κ(α) turns the optimum at α into that at α'. Token by token, each token is normalised by itself, which is
another distribution, the more so the more the models disagree about how a response goes on.

All options of `generate` of transformers work that read or warp scores: sampling, beams, several samples, padding on
the left. What forbids tokens (`min_new_tokens`, `bad_words_ids`, ...) acts on the mixture.
"""

from mopl.decoding._generating import ACT_BEFORE
from mopl.decoding.followers import Follower, copies_of, mask_so_far, on_vocabulary
from mopl.decoding.guided import GuidedLogits, guided
from mopl.decoding.mixtures import MixedLogits, dera, logit_mixing

__all__ = [
    "ACT_BEFORE", "Follower", "GuidedLogits", "MixedLogits", "copies_of", "dera", "guided", "logit_mixing",
    "mask_so_far", "on_vocabulary",
]  # fmt: skip
