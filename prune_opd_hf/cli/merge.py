"""`prune-opd merge ADAPTER --output_dir DIR`: a plain student of an adapter and its base, for whatever knows no adapters."""

from dataclasses import dataclass

from prune_opd_hf.cli.parser import LoadingArguments
from prune_opd_hf.records.settings import NEEDED, setting


@dataclass(frozen=True)
class MergeArguments(LoadingArguments):
    """Arguments of `prune-opd merge`."""

    adapter: str = setting(NEEDED, "folder or Hub id of an adapter, such as prune-opd train --use_peft leaves")
    output_dir: str = setting(NEEDED, "a new folder, for the whole weights with their tokenizer")


def merge(arguments: MergeArguments) -> int:
    """Add the adapter's weights to its base's, and print where the student lies; 0."""
    from prune_opd_hf.models.loading import merge_adapter

    merge_adapter(arguments.adapter, arguments.output_dir, **{"dtype": "auto", **arguments.loading()})
    print(f"The merged student lies in {arguments.output_dir}")
    return 0
