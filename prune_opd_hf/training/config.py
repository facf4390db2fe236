"""Settings of the trainer: Transformers' own, and those of Prune-OPD under the words TRL users know."""

import json
from dataclasses import dataclass, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prune_opd_hf.algorithm.budget import NATURAL_ENDS, ResponseBudget
from prune_opd_hf.algorithm.drift import METRICS, DriftConfig
from prune_opd_hf.algorithm.losses import DIRECTIONS, ESTIMATORS, TAILS
from prune_opd_hf.algorithm.rewards import SUPPORTS, WEIGHTINGS
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import ENGINES, VLLMSettings
from prune_opd_hf.generation.engine import refuse_owned
from prune_opd_hf.generation.vllm.protocol import MODES
from prune_opd_hf.models.prompts import FINAL_ASSISTANT_MESSAGE
from prune_opd_hf.records.files import first_line
from prune_opd_hf.records.settings import setting, typed
from prune_opd_hf.training.objective import LOSSES
from prune_opd_hf.training.pruning import MATCHES, PRUNING, Pruning, check_length_settings
from prune_opd_hf.training.setting_rules import check_needs, check_rules, check_template

Dictionary = dict[str, Any] | str | None  # a str is JSON
DICTIONARIES = (
    *("model_init_kwargs", "teacher_model_init_kwargs", "teacher_models", "teacher_quantization_config"),
    *("chat_template_kwargs", "generation_kwargs"),
)
FALLING_METRICS = ("loss", "kl", "truncated_share")
"""Metrics of an evaluation of which less is better."""


def check_reporting(report_to: Any) -> None:
    """Refuse a tracker that is unknown or whose package is missing, before a model is loaded."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in set(names) - {"all", "none", *get_available_reporting_integrations()}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to must name some of {', '.join(INTEGRATION_TO_CALLBACK)}, all or none; got {name!r}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to={name}: {first_line(error)} Or leave it out of report_to") from error


@dataclass
class PruneOPDConfig(TrainingArguments):
    """Everything that decides a run of `PruneOPDTrainer`. Every field of `transformers.TrainingArguments` is here as well.

    The defaults are those of the published scripts (arXiv 2605.07804): learning rate 1e-6, constant; AdamW with weight decay
    0.01; gradient clip 1; 4 rollouts for each prompt; but for the drift metric, which is published as drift_metric="overlap".

    `per_device_train_batch_size` counts rollouts in one micro-batch of the update. An optimizer step takes
    `per_device_train_batch_size * gradient_accumulation_steps` rollouts on each process, generated together.

    Raises:
        ConfigError: a value outside its range; names the field and what it accepts.

    Example:
        >>> config = PruneOPDConfig(output_dir="runs/student", max_completion_length=4096, drift_threshold=0.8)
        >>> config.make_budget().length, config.drift_config().threshold
        (2048, 0.8)
    """

    # TrainingArguments with other defaults
    learning_rate: float = setting(1e-6, "Peak learning rate of AdamW.")
    lr_scheduler_type: SchedulerType | str = setting("constant", "Learning-rate schedule.")
    weight_decay: float = setting(0.01, "Weight decay of AdamW.")
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    remove_unused_columns: bool = setting(False, "Stays False: prompts are read by name.")

    # models
    teacher_model_name_or_path: str | None = setting(
        None, "Teacher as a Hub id or a folder, where none is given as an object."
    )
    teacher_model_server_url: str | None = setting(
        None,
        "The teacher is what vLLM servers at this URL serve; several separated by commas share the rows. "
        "teacher_model_name_or_path then names its tokenizer alone. Key: TEACHER_VLLM_API_KEY in the environment.",
    )
    teacher_model_server_timeout: float = setting(
        240.0, "Seconds without an answer, after which such a server counts as gone."
    )
    teacher_models: Dictionary = setting(
        None,
        "Several teachers by name, each a Hub id, a folder or a server's URL, as a dict or JSON. The dataset's column 'teacher' "
        "names each row's. Key of a server: TEACHER_VLLM_API_KEY_NAME.",
    )
    teacher_model_kind: str | None = setting(
        None,
        "The student teaches itself: 'base' as it was before training, 'live' as it is, 'ema' as a moving average of its weights. "
        "Of use where the teacher reads more than the student.",
        choices=("base", "live", "ema"),
    )
    teacher_update_rate: float = setting(0.05, "'ema': the share of the student's weights in each update, in (0, 1].")
    teacher_sync_steps: int = setting(1, "'ema': optimizer steps between two updates.")
    teacher_prompt_template: str | None = setting(
        None,
        "What the teacher reads in place of the prompt: text with columns of the dataset in braces, such as "
        "'{prompt} (The answer is {answer}.)'. The dataset may have a column 'teacher_prompt' instead.",
    )
    teacher_quantization_config: Dictionary = setting(
        None,
        "Load the teacher quantized, by Transformers' own integrations: a dict or JSON, such as "
        '\'{"quant_method": "bitsandbytes", "load_in_8bit": true}\'.',
    )
    offload_teacher: bool = setting(
        False, "Keep the teacher's weights in the CPU's memory while the student is updated."
    )
    shard_teacher: bool = setting(
        False,
        "Each process keeps a share of the teacher's layers (FSDP2), and gathers a layer when it passes through it.",
    )
    model_init_kwargs: Dictionary = setting(
        None, "Keyword arguments for loading the student by name, as a dict or JSON."
    )
    teacher_model_init_kwargs: Dictionary = setting(
        None, "Keyword arguments for loading the teacher by name, as a dict or JSON."
    )
    allow_renamed_special_tokens: bool = setting(
        False,
        "Let added and special tokens that student and teacher call by different names pass: they are neither sampled nor "
        "compared, and the log names them.",
    )

    # data
    shuffle_dataset: bool = setting(
        True, "Take the prompts in a random order, anew in each epoch. A stream keeps its order."
    )
    max_prompt_length: int | None = setting(
        1024, "Prompts with more tokens are dropped and counted. None (null on a command line) keeps all."
    )
    chat_template_kwargs: Dictionary = setting(
        None, "For the chat template, as a dict or JSON, e.g. '{\"enable_thinking\": true}'."
    )

    final_assistant_message: str = setting(
        "refuse",
        "A prompt whose last message is the assistant's: 'refuse' it, 'drop' that message, or 'prefill' (the student goes on with "
        "it, as with continue_final_message).",
        choices=FINAL_ASSISTANT_MESSAGE,
    )

    # rollouts
    num_generations: int = setting(4, "Rollouts for each prompt.")
    num_iterations: int = setting(
        1, "Optimizer steps on each batch of rollouts; from the second on, PPO's clip is at work."
    )
    temperature: float = setting(1.0, "Sampling temperature of the rollouts; 0 is greedy.")
    top_p: float = setting(1.0, "Nucleus of the sampling of the rollouts, in (0, 1].")
    top_k: int = setting(0, "Rollouts are sampled from so many most likely tokens; 0: from all.")
    min_p: float | None = setting(
        None, "Rollouts leave out tokens below this share of the most likely one's probability."
    )
    repetition_penalty: float = setting(1.0, "Divides the logits of tokens that stand there already; 1: no penalty.")
    eos_token_id: list[int] | None = setting(
        None,
        "Tokens that end a response. None: all that the generation config or the tokenizer of student or teacher names, as far "
        "as both know them.",
    )
    max_completion_length: int = setting(
        12288, "No response is longer than this many tokens; the budget's upper bound."
    )
    generation_batch_size: int | None = setting(
        None, "Rollouts generated at once on each process; one that ends makes room for the next. None: all."
    )
    generation_kwargs: Dictionary = setting(
        None,
        'Further arguments for generate, as a dict or JSON, e.g. \'{"stop_strings": ["Question:"]}\'. What the student\'s '
        "generation config says of sampling is left out.",
    )
    rollout_engine: str = setting(
        "auto",
        "Who samples the rollouts: 'loop' is this package's own, 'continuous_batching' Transformers', both with the "
        "trainer's copy of the weights; 'vllm' as the vllm_ fields say. 'auto': continuous batching on a GPU, else the loop.",
        choices=ENGINES,
    )
    rollout_dtype: str | None = setting(
        None,
        "'bfloat16': the loop samples with a copy of the student in bfloat16, renewed before every step, two bytes for each "
        "weight. None: with the weights that are trained.",
        choices=("bfloat16",),
    )
    compile_decoding: bool = setting(
        False,
        "The loop's decoding step goes through torch.compile, on a GPU as a CUDA graph; its cache stays in memory between steps.",
    )
    use_vllm: bool = setting(False, "The same as rollout_engine='vllm'.")
    vllm_mode: str = setting(
        "colocate", "'server': vLLM runs at vllm_server_base_url; 'colocate': in the trainer's process.", choices=MODES
    )
    vllm_server_base_url: str | None = setting(
        None,
        "'server': its URL, or several separated by commas, which share the rollouts. None: http://127.0.0.1:8000.",
    )
    vllm_server_timeout: float = setting(
        240.0, "'server': seconds without a sign of it, after which it counts as gone."
    )
    vllm_gpu_memory_utilization: float = setting(0.3, "'colocate': share of the GPU's memory that vLLM takes.")
    vllm_enable_sleep_mode: bool = setting(False, "'colocate': give that memory back while the student is updated.")
    vllm_weights_dir: str | None = setting(
        None, "'server': folder from which the servers read new weights, under the same path. None: a temporary one."
    )

    # evaluation
    eval_temperature: float = setting(1.0, "Sampling temperature of evaluations; 0 is greedy.")
    eval_top_p: float = setting(1.0, "Nucleus of the sampling of evaluations, in (0, 1].")
    eval_top_k: int = setting(0, "Evaluations sample from so many most likely tokens; 0: from all.")
    eval_max_completion_length: int | None = setting(
        None, "Cap on the answers of an evaluation. None: max_completion_length."
    )
    num_generations_eval: int = setting(1, "Answers to each prompt of an evaluation.")

    # drift
    pruning: str = setting(
        "drift",
        "'drift' stops and weights by reliability, under the response budget; 'none' is plain on-policy "
        "distillation with max_completion_length as its cap. Controls: 'fixed' truncates every response at pruning_length; "
        "'random' draws a length for each (geometric from drift_min_length on, with pruning_length as its mean).",
        choices=PRUNING,
    )
    pruning_length: float | None = setting(None, "'fixed', 'random': mean truncation length in response tokens.")
    pruning_match: str = setting(
        "cut",
        "'fixed', 'random': 'cut' makes pruning_length the mean truncation length; 'kept' moves that mean after each "
        "step so that the mean of the tokens kept is pruning_length, although some responses end by themselves.",
        choices=MATCHES,
    )
    reliability_weights: bool | None = setting(
        None, "Weight tokens by reliability + drift_weight_base. None: only with pruning='drift'."
    )
    drift_metric: str = setting("weighted_overlap", "What counts as drift; see DriftConfig.", choices=METRICS)
    drift_top_k: int = setting(16, "Candidates compared at each position.")
    drift_threshold: float | None = setting(
        None,
        "Agreement below it is a drift event; in (0, 1]. None: the metric's own, 0.5 for weighted_overlap; see DriftConfig.",
    )
    drift_weight_drop: float = setting(0.01, "Reliability lost at each drift event; in [0, 1].")
    drift_weight_base: float = setting(0.5, "Weight that every response token keeps; >= 0.")
    drift_min_length: int | None = setting(
        None, "No sequence is stopped before so many tokens. None: the budget's minimum."
    )
    check_every: int = setting(32, "Tokens between two teacher passes.")

    # response budget
    budget_initial: int | None = setting(
        None, "Cap of the first step. None: 2048, or max_completion_length if that is less."
    )
    budget_minimum: int | None = setting(
        None, "The cap never falls below. None: 1024, or a quarter of max_completion_length if that is less."
    )
    budget_step: int | None = setting(
        None,
        "Tokens by which the cap grows or shrinks. None: 100, or a twelfth of max_completion_length if that is less.",
    )
    budget_hit_ratio: float = setting(0.1, "Share of sequences that must reach the boundary.")
    budget_margin: int | None = setting(
        None, "The boundary lies so many tokens below the cap. None: as budget_step's default."
    )
    budget_patience: int = setting(3, "Misses in a row before the cap shrinks.")
    budget_natural_ends: str = setting(
        "ignore",
        "Sequences that end by EOS before the boundary: 'ignore', or 'miss' as the reference counts them.",
        choices=NATURAL_ENDS,
    )

    # loss
    loss_type: str = setting(
        "topk_policy_gradient",
        "'topk_policy_gradient' rewards candidates (the paper's, centred); 'topk_kl' is the KL on them; "
        "'sampled_token' looks at the sampled token alone; 'generalized_jsd' (with beta) and 'reverse_kl' compare the whole "
        "vocabulary, at the price of a further pass of the teacher's backbone over each response.",
        choices=LOSSES,
    )
    loss_top_k: int = setting(16, "Candidates at each position that get a reward.")
    loss_centered: bool = setting(True, "Rewards of a position sum to 0. False: the reference's literal reward.")
    loss_weighting: str = setting("student", "Weights of the candidates.", choices=WEIGHTINGS)
    loss_support: str = setting("student", "Which candidates: top-k of whom.", choices=SUPPORTS)
    topk_kl_direction: str = setting(
        "reverse", "'topk_kl': KL(student, teacher) or KL(teacher, student).", choices=DIRECTIONS
    )
    topk_kl_tail: str = setting(
        "renormalize",
        "'topk_kl': renormalise over the candidates, or put everything else into one bucket.",
        choices=TAILS,
    )
    sampled_estimator: str = setting(
        "k1", "'sampled_token': the estimator of the KL; one gradient, two values.", choices=ESTIMATORS
    )
    beta: float = setting(
        1.0, "'generalized_jsd': 0 is the forward KL, 1 the reverse KL, between them Jensen-Shannon (TRL's beta)."
    )
    loss_temperature: float = setting(
        1.0, "'generalized_jsd', 'reverse_kl': divides the logits of both models in the loss."
    )
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "Tokens, prompts included, of one forward and backward pass of an update: a step takes as many passes as its tokens need, "
        "packed without padding where the family allows it. None: per_device_train_batch_size rows.",
    )
    max_skipped_steps: int = setting(
        5,
        "A step whose gradient is not finite, or in which no token has a weight, is skipped and counted. After so "
        "many in a row the run stops with a checkpoint; 0 never stops it.",
    )
    length_explosion: str = setting(
        "warn",
        "When responses grow to max_completion_length: 'warn', 'stop' with a checkpoint, or 'ignore'.",
        choices=("warn", "stop", "ignore"),
    )
    clip_low: float = setting(0.2, "PPO clip: the ratio counts from 1 - clip_low.")
    clip_high: float = setting(0.2, "PPO clip: the ratio counts up to 1 + clip_high.")
    dual_clip: float = setting(3.0, "Limit of the surrogate for negative rewards.")

    # output
    log_completions: bool = setting(
        False, "Show sample completions beside each log line, the drifted tail marked; as a table in wandb and trackio."
    )
    num_completions_to_print: int | None = setting(
        4, "Completions shown by log_completions. None (null on a command line): all of the step."
    )
    save_dtype: str | None = setting(
        None,
        "The finished student's weights are saved as float32, bfloat16 or float16. None: as they were trained. Checkpoints always "
        "are, so that a run goes on as it was.",
        choices=("float32", "bfloat16", "float16"),
    )
    save_rollouts_steps: int | None = setting(None, "Store the rollouts of every so many steps in output_dir/rollouts.")

    def __post_init__(self) -> None:
        for name, value in typed(type(self), vars(self)).items():
            setattr(self, name, value)
        self.report_to = getattr(self, "report_to", None) or "none"
        check_reporting(self.report_to)
        for name in DICTIONARIES:
            self.dictionary(name)
        refuse_owned(self.dictionary("generation_kwargs"))
        if getattr(self, "greater_is_better", None) is None and (self.metric_for_best_model or "").endswith(
            FALLING_METRICS
        ):
            self.greater_is_better = False
        try:
            super().__post_init__()
        except (ImportError, OverflowError, ValueError, TypeError) as error:
            if self.deepspeed:  # Transformers asks its half-made configuration whenever it loads a model
                unset_hf_deepspeed_config()
            raise ConfigError(" ".join(str(error).split())) from error
        if self.use_vllm:
            if self.rollout_engine not in ("auto", "vllm"):
                raise ConfigError(
                    f"use_vllm and rollout_engine={self.rollout_engine!r} contradict each other: set one of them"
                )
            self.rollout_engine = "vllm"
        check_rules(self)
        check_needs(self)
        if self.rollouts_per_step % self.num_generations != 0:
            raise ConfigError(
                f"a step has {self.rollouts_per_step} rollouts (per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} x {self.world_size} processes), which is "
                f"not a multiple of num_generations {self.num_generations}"
            )
        check_length_settings(self)
        self.vllm_settings()
        if self.teacher_prompt_template is not None:
            check_template(self.teacher_prompt_template)
        self.drift_config()
        self.make_budget()

    def dictionary(self, name: str) -> dict[str, Any]:
        """A field that takes a dict or JSON, as a dict; empty where it is not set."""
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ConfigError(f"{name} must be a dict or JSON, got {value!r} ({error})") from error
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name} must be a dict or a JSON object, got {value!r}")
        return value or {}

    def drift_config(self) -> DriftConfig:
        """The drift settings as the monitor takes them."""
        minimum = self.make_budget().minimum if self.drift_min_length is None else self.drift_min_length
        chosen = {} if self.drift_threshold is None else {"threshold": self.drift_threshold}
        return DriftConfig(
            metric=self.drift_metric,
            top_k=self.drift_top_k,
            weight_drop=self.drift_weight_drop,
            weight_base=self.drift_weight_base,
            min_length=minimum,
            **chosen,
        )

    def vllm_settings(self) -> VLLMSettings:
        """Where vLLM runs, as the engine takes it."""
        names = [item.name for item in fields(VLLMSettings)]
        return VLLMSettings.of(**{name: getattr(self, f"vllm_{name}") for name in names})

    def reuse(self) -> dict[str, int]:
        """How prompts repeat so that several optimizer steps see the same rollouts: prompts of a step, and steps."""
        return {"rows_of_step": self.rollouts_per_step // self.num_generations, "steps": self.num_iterations}

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def weighs_by_reliability(self) -> bool:
        """Whether the loss weighs each token by its reliability."""
        chosen = self.reliability_weights
        return PRUNING[self.pruning].weighs_by_reliability if chosen is None else chosen

    def make_pruning(self) -> Pruning:
        """How rollouts are pruned, at the beginning of a run."""
        return PRUNING[self.pruning].from_config(self)

    def make_budget(self) -> ResponseBudget:
        """A fresh response budget with these settings."""
        longest = self.max_completion_length
        minimum = self.budget_minimum
        if minimum is None:
            minimum = min(1024, max(1, longest // 4), longest if self.budget_initial is None else self.budget_initial)
        initial = max(minimum, min(2048, longest)) if self.budget_initial is None else self.budget_initial
        step = min(100, max(1, longest // 12))
        return ResponseBudget(
            initial=initial,
            minimum=minimum,
            maximum=longest,
            step=step if self.budget_step is None else self.budget_step,
            hit_ratio=self.budget_hit_ratio,
            margin=step if self.budget_margin is None else self.budget_margin,
            patience=self.budget_patience,
            natural_ends=self.budget_natural_ends,
        )


def settings_of(args: Any) -> PruneOPDConfig:
    """What a trainer was given as `args`, or the defaults; Transformers' own arguments are refused."""
    if args is not None and not isinstance(args, PruneOPDConfig):
        raise ConfigError(f"args must be a PruneOPDConfig, which has all TrainingArguments; got {type(args).__name__}")
    return PruneOPDConfig(output_dir="prune_opd_output") if args is None else args
