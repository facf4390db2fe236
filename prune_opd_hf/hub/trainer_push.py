"""`trainer.push_to_hub()` by the way of `publish_student`: the same checks, card and single commit as the command line's.

`PublishesStudents` is a base of a trainer, the last one. What it needs from the rest of `publishing` is imported when it is
called: the trainer imports this module, and a card needs the trainer's summary.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

if TYPE_CHECKING:
    from prune_opd_hf.hub.client import Patience
    from prune_opd_hf.hub.publish import CardOptions, Published

logger = logging.getLogger(__name__)


class PublishesStudents(Trainer):
    """What a `Trainer` does with the Hub, done by `publish_student`; base of trainers with a `summary()`.

    The Trainer's own way makes several commits, so that weights stand on the Hub without their card: during training, and
    for good where a run is killed. Here one commit holds all, and nothing is sent before `push_to_hub` or a `save_model` that
    a user calls with `push_to_hub=True`.
    """

    _told_of_checkpoints = False

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        tag: str | None = None,
        options: "CardOptions | None" = None,
        known: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
        patience: "Patience | None" = None,
        **card: Any,
    ) -> "Published | None":
        """Save what the trainer holds to `args.output_dir`, and publish that: weights, tokenizer, card and records at once.

        Call it on every process: saving may need all of them, only the first one publishes. The repository is
        `args.hub_model_id`, in the token's own namespace where it names no owner, and named after the output folder where
        it is not set. What is not given here is taken from `args.hub_token`, `hub_private_repo` and `hub_revision`.

        Args:
            commit_message: first line of the commit.
            blocking: must be True: nobody could be told of an error otherwise.
            token, revision, private, create_pr, tag: see `Target`.
            options: what the card says beyond the records.
            known: fields of the training summary that the trainer cannot know, such as `dataset`; those of a summary that
                lies in the folder already are kept.
            endpoint: of another Hub.
            patience: how long to bear with a Hub that fails.

        Returns:
            What was published; None on the other processes.

        Raises:
            ConfigError: `blocking=False`, or one of `Trainer.create_model_card`'s settings, which have no place here.
            PublishError: the folder is not fit to be published; for example it holds reports of other weights.
            HubAccessError, HubError: as of `publish_student`.
        """
        from prune_opd_hf.errors import ConfigError

        if not blocking:
            raise ConfigError("push_to_hub must wait for the Hub's answer to tell of errors: leave out blocking=False")
        if card:
            raise ConfigError(
                f"push_to_hub does not take {', '.join(card)}: the card is made from the run's records; "
                "say more with options=CardOptions(...) and known={...}"
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return _push(
            self,
            message=commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision,
            private=private,
            create_pr=create_pr,
            tag=tag,
            options=options,
            known=known or {},
            endpoint=endpoint,
            patience=patience,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing is created before there is something to publish."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here: on the Hub they would be weights without a card."""
        if not self._told_of_checkpoints:
            logger.warning(
                "checkpoints are not sent to the Hub: trainer.push_to_hub() publishes the student at the end"
            )
            self._told_of_checkpoints = True

    def _finish_current_push(self) -> None:
        """No push is ever under way in the background."""


def _push(
    trainer: Any,
    *,
    message: str,
    token: str | None,
    revision: str | None,
    private: bool | None,
    create_pr: bool,
    tag: str | None,
    options: "CardOptions | None",
    known: Mapping[str, Any],
    endpoint: str | None,
    patience: "Patience | None",
) -> "Published | None":
    from huggingface_hub import HfApi

    from prune_opd_hf.hub.client import Patience
    from prune_opd_hf.hub.commit import Target
    from prune_opd_hf.hub.publish import publish_student

    arguments, patience = trainer.args, patience or Patience()
    trainer.save_model(
        arguments.output_dir, _internal_call=True
    )  # else a Trainer that pushes what it saves comes back here
    if not trainer.is_world_process_zero():
        return None
    trainer.summary(**{**_names(arguments.output_dir), **known}).save(arguments.output_dir)
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


def _names(folder: str) -> dict[str, Any]:
    """What a summary in the folder says that the trainer does not know: names, and how to repeat the run."""
    from prune_opd_hf.records.training_summary import SUMMARY_FILE, TrainingSummary

    if not (Path(folder) / SUMMARY_FILE).is_file():
        return {}
    saved = TrainingSummary.load(folder)
    names = ("dataset", "student_base", "teacher", "command", "example_prompt")
    return {name: getattr(saved, name) for name in names if getattr(saved, name) is not None}


def _repo_id(arguments: Any, api: Any, patience: "Patience") -> str:
    from prune_opd_hf.hub.client import patiently

    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    if "/" in name:
        return name
    return f"{patiently(api.whoami, patience, doing='asking the Hub who you are')['name']}/{name}"
