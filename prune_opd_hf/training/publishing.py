"""A Trainer's way to the Hub: what lies in its output folder, with a card made from the run's record, in one commit."""

from abc import abstractmethod
from typing import Any

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.hub import CardOptions, Published, build_bundle, publish_output
from prune_opd_hf.records.training_summary import TrainingSummary
from prune_opd_hf.training.resuming import ResumingTrainer


class PublishingTrainer(ResumingTrainer):
    """Base of a Trainer that publishes its student with the record of the run."""

    @abstractmethod
    def summary(self, **known: Any) -> TrainingSummary:
        """The publishable record of the run so far, with fields that the trainer cannot know."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> Published | None:
        """Save to `args.output_dir` and publish that in one commit; call it on every process.

        Args:
            blocking: must be True: nobody could learn of an error otherwise.
            options: of `hub.publish_output`, such as `known`: what the summary should say and the trainer cannot know.

        Returns:
            What was published; None on other processes than the first.
        """
        if not blocking:
            raise ConfigError("push_to_hub must wait for the Hub's answer to report errors: leave out blocking=False")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(self.args.output_dir, _internal_call=True)  # otherwise it would push, and come back here
        if not self.is_world_process_zero():
            return None
        options |= {"commit_message": commit_message, "token": token, "revision": revision, "private": private}
        return publish_output(self.args, self.summary(), **options)

    def create_model_card(self, model_name: str | None = None, options: CardOptions | None = None) -> None:
        """Write the card of what lies in `args.output_dir`, from its records."""
        if self.is_world_process_zero():
            bundle = build_bundle(self.args.output_dir, name=model_name, options=options, figures=False)
            bundle.card.save(f"{self.args.output_dir}/README.md")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing is created on the Hub before there is something to publish."""
