"""From a student's folder to the Hub: checks first, then one commit that holds weights, card and records together."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, get_token

from prune_opd_hf.errors import ConfigError, HubAccessError, HubError, PruneOPDError
from prune_opd_hf.hub.access import Target, check_access
from prune_opd_hf.hub.bundle import Bundle, CardOptions, build_bundle, refuse_no_folder
from prune_opd_hf.hub.cards import License
from prune_opd_hf.hub.commit import Committed, commit_once, plan_commit, validate_card
from prune_opd_hf.hub.hub_ids import is_hub_id, is_local
from prune_opd_hf.hub.leaks import Machine
from prune_opd_hf.hub.patience import Patience, patiently
from prune_opd_hf.hub.records import StudentRecords
from prune_opd_hf.hub.student_checks import adapter_config
from prune_opd_hf.hub.student_files import is_replaced, refuse_leaks


@dataclass(frozen=True)
class Uploaded:
    """Files that are on the Hub.

    Attributes:
        url: where people find them: the repository, or the pull request.
        commit_id: hash of the commit that holds them; the exact revision to load.
        found: nothing was sent, because this very content was there already.
    """

    url: str
    commit_id: str
    found: bool = False


@dataclass(frozen=True)
class Published:
    """A student that is on the Hub.

    Attributes:
        url, commit_id, found: as of `Uploaded`.
        bundle: what was published.
    """

    url: str
    commit_id: str
    bundle: Bundle
    found: bool = False


def publish_student(
    folder: str | os.PathLike[str],
    target: Target,
    *,
    records: StudentRecords | None = None,
    options: CardOptions | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    show: Callable[[str], None] | None = None,
) -> Published:
    """Publish a trained student: weights, tokenizer, card, reports, training summary and figures in one commit.

    Everything is checked before the first byte goes out: that the weights are whole, finite safetensors which load,
    that tokenizer and generation config are there, that each report belongs to these very weights, that no secret and no
    path of this machine stands in any file, that the Hub accepts the card, and that the token may write there. What
    fails for a moment is tried again; a commit whose answer was lost is looked for before it is sent a second time.

    Args:
        folder: as `save_pretrained` and the trainer write it.
        target: where to publish.
        records: training summary and evaluation reports; by default those in the folder.
        options: what the card says beyond them. Without a licence, that of the base model is looked up.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub; by default that of HF_ENDPOINT.
        patience: how long to bear with a Hub that fails.
        show: is told what will be uploaded and how large it is, before it happens.

    Raises:
        PublishError: the folder is not fit to be published.
        LeakError: a secret or a path of this machine stands in what would be published.
        HubAccessError: no token, one that only reads, or somebody else's namespace.
        HubError: the Hub refuses, or still fails after the last try.

    The work of `prune-opd publish`; see `build_bundle` for the part that needs no network:
        >>> from prune_opd_hf.hub import build_bundle
        >>> build_bundle("no/such/folder")
        Traceback (most recent call last):
            ...
        prune_opd_hf.errors.PublishError: no/such/folder is not a folder: name the one that the trained student was saved to
    """
    patience, show = patience or Patience(), show or _show_nothing
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    refuse_no_folder(folder)
    _refuse_leaks_in_words(target, folder, api)
    there = check_access(api, target, patience)
    bundle = prepare_bundle(folder, target.repo_id, records=records, options=options, api=api, patience=patience)
    validate_card(api, str(bundle.card), patience)
    show(f"to {target.describe()}:\n{bundle.describe()}")
    sent = upload(api, target, there, bundle.files, patience, replaced=is_replaced, show=show)
    return Published(url=sent.url, commit_id=sent.commit_id, bundle=bundle, found=sent.found)


def _show_nothing(words: str) -> None:
    """Where nobody is to be told."""


def _refuse_leaks_in_words(target: Target, folder: str | os.PathLike[str], api: HfApi) -> None:
    """The words that go to the Hub beside the files."""
    words = {"message": target.message, "revision": target.revision, "tag": target.tag or ""}
    machine = Machine.here(folder, _token(api))
    refuse_leaks({f"the {name}": word.encode() for name, word in words.items()}, machine, {target.owner})


def _token(api: HfApi) -> str | None:
    return api.token if isinstance(api.token, str) else get_token()


def upload(
    api: HfApi,
    target: Target,
    there: ModelInfo | None,
    files: Mapping[str, Path | bytes],
    patience: Patience,
    *,
    replaced: Callable[[str], bool],
    show: Callable[[str], None] = _show_nothing,
) -> Uploaded:
    """Files to the Hub in one commit.

    Args:
        there: what `check_access` says about the repository.
        files: content by path in the repository.
        replaced: which files of an earlier revision the new ones replace.
        show: is told which files of an earlier revision are removed, before it happens.

    Raises:
        HubAccessError: the Hub does not allow it.
        HubError: the Hub refuses, or still fails after the last try.
    """
    if there is None:
        patiently(
            lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True),
            patience,
            doing=f"creating {target.repo_id}",
        )
    _prepare_branch(api, target, patience)
    plan = plan_commit(api, target, files, patience, replaced)
    if plan.stale and plan.existing is None:
        show(f"removed with this commit, as parts of an earlier revision: {', '.join(plan.stale)}")
    tagged = _tagged_commit(api, target, patience)
    if tagged is not None and (plan.existing is None or plan.existing.commit_id != tagged):
        raise HubError(
            f"the tag {target.tag} of {target.repo_id} stands at {tagged[:8]} already, and tags do not move: choose another "
            "--tag. Nothing was uploaded"
        )
    committed = commit_once(api, plan, patience)
    if target.tag is not None and tagged is None:
        _tag(api, target.repo_id, target.tag, committed, patience)
    return Uploaded(committed.pr_url or f"{api.endpoint}/{target.repo_id}", committed.commit_id, committed.found)


def prepare_bundle(
    folder: str | os.PathLike[str],
    repo_id: str | None,
    *,
    records: StudentRecords | None,
    options: CardOptions | None,
    api: HfApi,
    patience: Patience | None,
) -> Bundle:
    """`build_bundle`, with the base model's licence looked up on the Hub where none is given.

    Args:
        patience: with a Hub that fails; None makes do without the licence then.
    """
    options = options or CardOptions()
    if options.license is None:
        base = _base_model(folder, records)
        options = replace(options, license=license_of(api, base, patience) if base is not None else None)
    return build_bundle(folder, repo_id=repo_id, records=records, options=options, token=_token(api))


def _base_model(folder: str | os.PathLike[str], records: StudentRecords | None) -> str | None:
    """The base model's Hub id, where the records or the adapter name one; what is wrong with them is said later."""
    with contextlib.suppress(PruneOPDError):
        training = (records or StudentRecords.load(folder)).training
        if training is not None and is_hub_id(training.student_base) and not is_local(training.student_base):
            return training.student_base
    with contextlib.suppress(PruneOPDError):
        return adapter_config(Path(folder))["base_model_name_or_path"]
    return None


def license_of(api: HfApi, model_id: str, patience: Patience | None) -> License | None:
    """The licence that a model's card on the Hub states; None where it states none, or the model cannot be seen.

    Args:
        patience: with a Hub that fails. A card that depended on the Hub's mood would make a second publication of the same
            student; None asks once and makes do without an answer.

    Raises:
        HubError: the Hub still fails after the last try.
    """
    try:
        data = patiently(
            lambda: api.model_info(model_id).card_data,
            patience or Patience(attempts=1, timeout_seconds=10.0),
            doing=f"looking up the licence of {model_id} (--license states it)",
        )
    except HubAccessError:
        return None
    except HubError:
        if patience is None:
            return None
        raise
    if data is None or not isinstance(data.get("license"), str):
        return None
    with contextlib.suppress(ConfigError):
        link = data.get("license_link")
        if isinstance(link, str) and "://" not in link:  # a file beside the base model's weights
            link = f"https://huggingface.co/{model_id}/blob/main/{link}"
        return License(data.get("license"), name=data.get("license_name"), link=link)
    return None


def _prepare_branch(api: HfApi, target: Target, patience: Patience) -> None:
    if target.revision == "main" or target.create_pr or target.revision.startswith("refs/pr/"):
        return
    refs = patiently(
        lambda: api.list_repo_refs(target.repo_id), patience, doing=f"listing the branches of {target.repo_id}"
    )
    if target.revision in {branch.name for branch in refs.branches}:
        return
    if target.revision in {tag.name for tag in refs.tags}:
        raise HubError(
            f"{target.revision} is a tag of {target.repo_id}, and tags do not move: choose another --revision"
        )
    patiently(
        lambda: api.create_branch(target.repo_id, branch=target.revision, exist_ok=True),
        patience,
        doing=f"creating the branch {target.revision}",
    )


def _tagged_commit(api: HfApi, target: Target, patience: Patience) -> str | None:
    """The commit that already has the wanted tag."""
    if target.tag is None:
        return None
    refs = patiently(
        lambda: api.list_repo_refs(target.repo_id), patience, doing=f"listing the tags of {target.repo_id}"
    )
    return next((tag.target_commit for tag in refs.tags if tag.name == target.tag), None)


def _tag(api: HfApi, repo_id: str, tag: str, committed: Committed, patience: Patience) -> None:
    patiently(
        lambda: api.create_tag(repo_id, tag=tag, revision=committed.commit_id, exist_ok=True),
        patience,
        doing=f"tagging {committed.commit_id[:8]} as {tag}",
    )
