"""What a run says of its settings before its first step: end tokens, sampling, pruning, what a step is made of.

Lines are facts, shown with the progress; what is probably not meant goes to the log as a warning.
"""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from prune_opd_hf.generation import Sampling
from prune_opd_hf.models.end_tokens import EndTokens
from prune_opd_hf.models.generation_config import MODES, NEUTRAL
from prune_opd_hf.training.config import PruneOPDConfig
from prune_opd_hf.training.pruning import Pruning
from prune_opd_hf.training.setting_rules import is_changed, without_effect

logger = logging.getLogger(__name__)


def opening_lines(
    args: PruneOPDConfig,
    end_tokens: EndTokens,
    sampling: Sampling,
    left_out: Mapping[str, Any],
    pruning: Pruning,
    packs: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """The lines.

    Args:
        sampling: of the rollouts.
        left_out: what the student's generation config says of sampling.
        packs: whether the update packs sequences.
    """
    stop_strings = sampling.generation_kwargs.get("stop_strings")
    further = f", or behind the text {stop_strings!r}" if stop_strings else ""
    lines = [f"end tokens: {end_tokens.describe(tokenizer)}{further}"]
    warped = chosen_warping(sampling)
    line = f"sampling: {named(warped)}" if warped else "sampling: from the student's own distribution"
    if left_out:
        line += f"; its generation config says {named(left_out)}, which is left out"
    lines += [line, f"pruning: {pruning.describe(args.drift_config())}"]
    rollouts = args.rollouts_per_step
    prompts = rollouts // args.num_generations
    step = f"{rollouts} rollouts, {args.num_generations} of each of {prompts} prompts"
    lines.append(f"a step: {step if prompts > 1 else f'{rollouts} rollouts, all of one prompt'}")
    if args.max_tokens_per_micro_batch is not None:
        padded = "padded, since student or teacher does not keep packed sequences apart"
        how = "packed without padding" if packs else padded
        lines.append(f"update: at most {args.max_tokens_per_micro_batch:,} tokens in a pass, {how}")
    unused = without_effect(args, "pruning")
    if not args.weighs_by_reliability and is_changed(args, "drift_weight_base"):
        unused.append("drift_weight_base")
    if unused:
        lines.append(f"without effect, since pruning is '{args.pruning}': {', '.join(unused)}")
    if is_changed(args, "num_completions_to_print") and not args.log_completions:
        lines.append("without effect, since log_completions is not set: num_completions_to_print")
    return lines


def warn_of_settings(args: PruneOPDConfig, sampling: Sampling, pruning: Pruning, vocab_size: int) -> None:
    """Log what these settings probably do not mean to say."""
    warped = chosen_warping(sampling)
    if warped:
        logger.warning(
            "rollouts are sampled with %s, so tokens do not come from the distribution p that overlap, KL and loss compare with "
            "the teacher's q, both at temperature 1: kl/sampled is no estimate of KL(p, q), and tokens are "
            "weighted by how often that sampling meets them",
            named(warped),
        )
    for temperature, count in (("temperature", "num_generations"), ("eval_temperature", "num_generations_eval")):
        equal = getattr(args, count)
        if getattr(args, temperature) == 0 and equal > 1:
            logger.warning("%s 0 gives %d equal responses to each prompt: set %s=1", temperature, equal, count)
    obstacle = pruning.obstacle(args.drift_config(), args.check_every, vocab_size)
    if obstacle is not None:
        logger.warning("pruning='%s' can stop no response: %s, or set pruning='none'", args.pruning, obstacle)


def chosen_warping(sampling: Sampling) -> dict[str, Any]:
    """What makes rollouts differ from draws of the student's own distribution, apart from ids that the teacher does not know.

    Example:
        >>> chosen_warping(Sampling(8, (1,), 0, temperature=0.7, generation_kwargs={"stop_strings": ["Q:"], "min_p": 0.1}))
        {'temperature': 0.7, 'min_p': 0.1}
    """
    if sampling.temperature == 0:
        return {"temperature": 0}
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    chosen |= sampling.generation_kwargs
    return {
        name: value
        for name, value in chosen.items()
        if name in NEUTRAL and name not in (*MODES, "stop_strings") and value not in (None, NEUTRAL[name])
    }


def named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
