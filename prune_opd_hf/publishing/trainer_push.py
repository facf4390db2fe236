"""`trainer.push_to_hub()` by the way of `publish_student`: the same checks, card and single commit as the command line's."""

from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from prune_opd_hf.publishing.access import Target
from prune_opd_hf.publishing.bundle import CardOptions
from prune_opd_hf.publishing.patience import Patience, patiently
from prune_opd_hf.publishing.publish import Published, publish_student
from prune_opd_hf.training.summary import TrainingSummary


def push_trainer(
    trainer: Trainer,
    summary: TrainingSummary,
    *,
    message: str = "End of training",
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    options: CardOptions | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
) -> Published | None:
    """Save what the trainer holds to its output folder, and publish that.

    Call it on every process: saving may need all of them, only the first one publishes. The repository is
    `args.hub_model_id`, in the token's own namespace where it names no owner, and named after the output folder where it
    is not set. What is not given here is taken from `args.hub_token`, `hub_private_repo` and `hub_revision`.

    Args:
        trainer: whose model and tokenizer are published.
        summary: of its run; saved beside the model, as the card's source.
        message: first line of the commit.
        token, revision, private, create_pr, tag: see `Target`.
        options: what the card says beyond the records.
        endpoint: of another Hub.
        patience: how long to bear with a Hub that fails.

    Returns:
        What was published; None on the other processes.

    Raises:
        PublishError: the folder is not fit to be published; for example it holds reports of other weights.
        HubAccessError, HubError: as of `publish_student`.
    """
    arguments = trainer.args
    patience = patience or Patience()
    token = token or arguments.hub_token
    trainer.save_model(arguments.output_dir)
    if not trainer.is_world_process_zero():
        return None
    summary.save(arguments.output_dir)
    target = Target(
        _repo_id(arguments, HfApi(endpoint=endpoint, token=token), patience),
        private=bool(arguments.hub_private_repo if private is None else private),
        create_pr=create_pr,
        revision=revision or arguments.hub_revision or "main",
        tag=tag,
        message=message,
    )
    return publish_student(
        arguments.output_dir, target, options=options, token=token, endpoint=endpoint, patience=patience
    )


def _repo_id(arguments: Any, api: HfApi, patience: Patience) -> str:
    name = arguments.hub_model_id or arguments.output_dir.rstrip("/").rsplit("/", 1)[-1]
    if "/" in name:
        return name
    return f"{patiently(api.whoami, patience, doing='asking the Hub who you are')['name']}/{name}"
