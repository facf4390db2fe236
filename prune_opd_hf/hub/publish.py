"""From a student's folder to the Hub: checks first, then one commit that holds weights, card and records together."""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from transformers import TrainingArguments

from prune_opd_hf.errors import ConfigError, HubAccessError, PruneOPDError
from prune_opd_hf.hub.bundle import Bundle, build_bundle
from prune_opd_hf.hub.card import CardOptions, License
from prune_opd_hf.hub.client import Retries, is_hub_id, is_local, with_retries
from prune_opd_hf.hub.commit import Committed, Target, commit_files
from prune_opd_hf.hub.folder import adapter_base, is_replaced, refuse_leaks
from prune_opd_hf.hub.leaks import Machine
from prune_opd_hf.records.student_records import StudentRecords
from prune_opd_hf.records.training_summary import SUMMARY_FILE, TrainingSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published(Committed):
    """A student that is on the Hub.

    Attributes:
        bundle: what was published.
    """

    bundle: Bundle = field(kw_only=True)


def publish_student(
    folder: str | os.PathLike[str],
    target: Target | str,
    *,
    records: StudentRecords | None = None,
    options: CardOptions | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    retries: Retries | None = None,
    show: Callable[[str], None] = lambda message: None,
) -> Published:
    """Publish a trained student: weights, tokenizer, card, reports, training summary and figures in one commit.

    Before the first byte goes out it is checked that the weights are complete, finite safetensors which load, that
    tokenizer and generation config are there, that each report belongs to these very weights, and that no secret and no
    path of this machine stands in any file. Transient errors are tried again; a commit whose answer was lost is looked for
    before it is sent a second time.

    Args:
        folder: as `save_pretrained` and the trainer write it.
        target: where to publish; a repository's id alone means its branch main.
        records: training summary and evaluation reports; by default those in the folder.
        options: what the card says beyond them. Without a licence, that of the base model is looked up.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub; by default that of HF_ENDPOINT.
        retries: how often and how long to try.
        show: gets what will be uploaded and how large it is, before it happens.

    Raises:
        PublishError: the folder is not fit to be published.
        LeakError: a secret or a path of this machine stands in what would be published.
        HubAccessError: no token, one that may not write there, or somebody else's namespace.
        HubError: the Hub refuses, or still fails after the last attempt.

    The work of `prune-opd publish`; `build_bundle` is the part of it that needs no network.
    """
    target, retries = Target(target) if isinstance(target, str) else target, retries or Retries()
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    token = api.token if isinstance(api.token, str) else get_token()
    words = {"commit message": target.commit_message, "revision": target.revision, "tag": target.tag or ""}
    refuse_leaks(
        {f"the {name}": word.encode() for name, word in words.items()},
        Machine.here(folder, token),
        {target.repo_id.split("/")[0]},
    )
    with_retries(api.whoami, retries, doing="asking the Hub who you are")
    options = with_license(options or CardOptions(), folder, records, api, retries)
    bundle = build_bundle(folder, repo_id=target.repo_id, records=records, options=options, token=token)
    branch = f"{'pull request to' if target.create_pr else 'branch'} {target.revision}"
    show(f"to {target.repo_id}, {branch}:\n{bundle.describe()}")
    sent = commit_files(api, target, bundle.files, retries, is_replaced=is_replaced, show=show)
    return Published(**vars(sent), bundle=bundle)


def with_license(
    options: CardOptions, folder: str | os.PathLike[str], records: StudentRecords | None, api: HfApi, retries: Retries
) -> CardOptions:
    """The options with a licence: where they state none, the one that the base model's card on the Hub states, if any.

    Raises:
        HubError: the Hub still fails after the last attempt. A card without the licence would be another card, and so a second
            commit of the same student.
    """
    base = None if options.license is not None else _base_model(Path(folder), records)
    if base is None:
        return options
    try:
        data = with_retries(
            lambda: api.model_info(base).card_data,
            retries,
            doing=f"looking up the licence of {base} (--license states it)",
        )
    except HubAccessError:  # a model that cannot be seen
        return options
    if data is None or not isinstance(data.get("license"), str):
        return options
    link = data.get("license_link")
    if isinstance(link, str) and "://" not in link:  # a file beside the base model's weights
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    with contextlib.suppress(ConfigError):
        return replace(options, license=License(data.get("license"), name=data.get("license_name"), link=link))
    return options


def _base_model(folder: Path, records: StudentRecords | None) -> str | None:
    """The base model's Hub id, where the records or the adapter name one; `build_bundle` reports what is wrong with them."""
    with contextlib.suppress(PruneOPDError):
        training = (records or StudentRecords.load(folder)).training
        base = adapter_base(folder) if training is None else training.student_base
        return base if is_hub_id(base) and not is_local(base) else None
    return None


def publish_output(
    arguments: TrainingArguments,
    summary: TrainingSummary,
    *,
    known: Mapping[str, Any] | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    options: CardOptions | None = None,
    endpoint: str | None = None,
    retries: Retries | None = None,
    **settings: Any,
) -> Published:
    """Publish what a trainer saved in its `output_dir`: the work of `trainer.push_to_hub`, on the first process.

    The repository is `hub_model_id`, in the token's own namespace where it names no owner, and named after the output folder
    where it is not set. What is not given here is taken from `hub_token`, `hub_private_repo` and `hub_revision`. Errors are
    those of `publish_student`; for example, the folder holds reports of other weights.

    Args:
        arguments: the trainer's.
        summary: of the run; it is saved in the folder.
        known: fields of the summary that the trainer cannot know, such as `dataset`. Names, command and example prompt of a
            summary that lies in the folder already are kept where nothing is given.
        settings: create_pr and tag of `Target`.
    """
    folder = arguments.output_dir
    saved = TrainingSummary.load(folder) if (Path(folder) / SUMMARY_FILE).is_file() else summary
    kept = ("dataset", "student_base", "teacher", "command", "example_prompt")
    names: dict[str, Any] = {name: getattr(saved, name) or getattr(summary, name) for name in kept}
    replace(summary, **{**names, **(known or {})}).save(folder)
    token, retries = token or arguments.hub_token, retries or Retries()
    repo_id = arguments.hub_model_id or Path(folder).resolve().name
    if "/" not in repo_id:
        api = HfApi(endpoint=endpoint, token=token)
        repo_id = f"{with_retries(api.whoami, retries, doing='asking the Hub who you are')['name']}/{repo_id}"
    target = Target(
        repo_id,
        private=bool(arguments.hub_private_repo if private is None else private),
        revision=revision or arguments.hub_revision or "main",
        commit_message=commit_message or "End of training",
        **settings,
    )
    published = publish_student(folder, target, options=options, token=token, endpoint=endpoint, retries=retries)
    for warning in published.bundle.warnings:
        logger.warning("%s: %s", target.repo_id, warning)
    return published
