"""Options of `prune-opd train` for adapters and quantized weights, in TRL's words."""

from dataclasses import dataclass
from typing import Any

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.settings import setting


@dataclass(frozen=True, kw_only=True)
class AdapterArguments:
    """Train an adapter instead of all weights (needs peft), on weights that are held in 4 or 8 bits if so wished."""

    use_peft: bool = setting(False, "Train a LoRA adapter instead of all weights (needs peft).")
    lora_r: int = setting(16, "Rank of the adapter.")
    lora_alpha: int = setting(32, "Scale of the adapter.")
    lora_dropout: float = setting(0.0, "Dropout of the adapter, in [0, 1).")
    lora_target_modules: list[str] = setting(["all-linear"], "Layers that get one: their names, or 'all-linear'.")
    lora_modules_to_save: list[str] = setting([], "Layers that are trained whole beside it, such as lm_head.")
    use_dora: bool = setting(False, "Train magnitudes apart from directions (DoRA, arXiv 2402.09353).")
    use_rslora: bool = setting(False, "Scale by the root of the rank (rsLoRA, arXiv 2312.03732).")
    load_in_4bit: bool = setting(
        False, "Hold the student's own weights in 4 bits (QLoRA; needs bitsandbytes and an adapter)."
    )
    load_in_8bit: bool = setting(False, "Hold the student's own weights in 8 bits (needs bitsandbytes and an adapter).")
    bnb_4bit_quant_type: str = setting("nf4", "The 4-bit format: nf4 or fp4.")
    use_bnb_nested_quant: bool = setting(False, "Quantize the scales of the 4-bit format as well.")

    def check_adapter(self) -> None:
        """Refuse what has no effect, and what cannot be trained."""
        changed = [name for name, value in vars(AdapterArguments()).items() if getattr(self, name) != value]
        of_adapter = [name for name in changed if name not in WEIGHT_OPTIONS]
        if not self.use_peft and of_adapter:
            raise ConfigError(f"{of_adapter[0]} has no effect without use_peft")
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_r must be at least 1 and lora_dropout lie in [0, 1), got {self.lora_r} and {self.lora_dropout}"
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other: choose one")
        if not self.load_in_4bit:
            for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
                if name in changed:
                    raise ConfigError(f"{name} has no effect without load_in_4bit")

    def peft_config(self) -> Any:
        """The adapter to train; None where all weights are trained."""
        if not self.use_peft:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ConfigError("use_peft needs peft: pip install 'prune-opd-hf[peft]'") from error
        targets = _names(self.lora_target_modules)
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            modules_to_save=_names(self.lora_modules_to_save) or None,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            task_type="CAUSAL_LM",
        )

    def quantization(self, dtype: str | None) -> dict[str, Any]:
        """How the student is quantized, as Transformers writes it into a model's config; empty where it is not. 4-bit layers
        compute in `dtype`, bfloat16 where none was chosen."""
        if self.load_in_8bit:
            return {"quant_method": "bitsandbytes", "load_in_8bit": True}
        if not self.load_in_4bit:
            return {}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
            "bnb_4bit_compute_dtype": "bfloat16" if dtype in (None, "auto") else dtype,
        }


WEIGHT_OPTIONS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
"""They act on an adapter that is trained further as well, which has its rank and layers already."""


def _names(texts: list[str]) -> list[str]:
    return [name.strip() for text in texts for name in str(text).split(",")]
