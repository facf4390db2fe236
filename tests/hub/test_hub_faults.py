"""Whatever fails on the way: one complete commit or none, never two, never weights without their card; the message says
what to do, and the next try succeeds."""

import pytest
from huggingface_hub import HfApi, close_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import ALICE, Fault, LoopbackHub
from loopback_hub.student_folders import save_student

from prune_opd_hf.errors import HubAccessError, HubError
from prune_opd_hf.hub import Retries, Target, publish_student
from prune_opd_hf.hub.client import with_retries

pytestmark = [
    pytest.mark.usefixtures("online"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own upload
]
QUICK = Retries(attempts=4, first_wait_seconds=0.01, max_wait_seconds=0.05, timeout_seconds=0.5)
COMMIT = r"POST .*/commit/"
REQUESTS = {
    "who am I": r"GET /api/whoami",
    "card check": r"POST /api/validate-yaml",
    "creating": r"POST /api/repos/create",
    "state": r"GET /api/models/alice/student/revision/",
    "history": r"GET .*/commits/",
    "tree": r"GET .*/tree/",
    "preupload": r"POST .*/preupload/",
    "batch": r"POST .*/objects/batch",
    "store": r"PUT /_store/",
    "verify": r"POST /_store/verify",
    "commit": COMMIT,
}
FAULTS = {
    "500": {"kind": "status", "status": 500},
    "502 page": {"kind": "status", "status": 502, "html": True},
    "408": {"kind": "status", "status": 408},
    "429": {"kind": "status", "status": 429, "retry_after": 1},
    "dropped before": {"kind": "drop_before"},
    "dropped after": {"kind": "drop_after"},
    "504 after": {"kind": "status_after", "status": 504},
    "truncated": {"kind": "truncate"},
}


def publish(student, hub, retries=QUICK, **target):
    return publish_student(
        student, Target("alice/student", **target), token=ALICE.token, endpoint=hub.endpoint, retries=retries
    )


def commits(hub) -> int:
    """Commits beyond the first one, which the Hub makes; each that holds weights holds their card and records too."""
    repository = hub.state.repositories.get("alice/student")
    if repository is None:
        return 0
    for commit in repository.commits.values():
        paths = set(commit.tree)
        if "model.safetensors" in paths:
            assert {
                "README.md",
                "config.json",
                "tokenizer.json",
                "evaluation/00-chain.json",
                "training_summary.json",
            } <= paths
    return len(repository.commits) - 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", ["commit", "creating"])
def test_a_fault_that_passes_is_lived_through_where_the_client_gives_up(student, request_, fault):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(REQUESTS[request_], **FAULTS[fault]))
        published = publish(student, hub)
        assert hub.faults[0].times == 0
        assert commits(hub) == 1
        assert published.commit_id == hub.repository("alice/student").resolve("main").id


def lives_through(student, request_, fault):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(REQUESTS[request_], **FAULTS[fault]))
        publish(student, hub)
        assert hub.faults[0].times == 0
        assert commits(hub) == 1


@pytest.mark.parametrize("request_", [name for name in REQUESTS if name not in {"commit", "creating"}])
def test_a_lost_answer_anywhere_on_the_way_is_lived_through(student, request_):
    lives_through(student, request_, "dropped after")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_fault_at_every_request_is_lived_through(student, request_, fault):
    lives_through(student, request_, fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pull_request_is_opened_once_whatever_happens_to_its_answer(student, fault, tmp_path):
    with LoopbackHub([ALICE]) as hub:
        publish(student, hub)
        other = save_student(tmp_path / "other", seed=1, history=False)
        hub.faults.append(Fault(COMMIT, **FAULTS[fault]))
        proposed = publish(other, hub, create_pr=True)
        assert hub.faults[0].times == 0
        assert list(hub.repository("alice/student").pull_requests) == [1]
        assert proposed.url.endswith("/discussions/1")


def test_an_answer_that_comes_too_late_is_not_waited_for(student):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(COMMIT, "delay", seconds=30.0))
        published = publish(student, hub)
        assert commits(hub) == 1
        assert published.commit_id == hub.repository("alice/student").resolve("main").id


HASTY = Retries(attempts=2, first_wait_seconds=0.01, timeout_seconds=0.15)


def gives_up(student, request_):
    """A Hub that hangs answers in the end, so that whoever waits for it ends without an error."""
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(REQUESTS[request_], "delay", times=10**6, seconds=60.0))
        with pytest.raises(HubError, match=r"timed out.* Run the same command again later"):
            publish(student, hub, HASTY)
        assert commits(hub) <= 1
        hub.faults.clear()
        publish(student, hub)
        assert commits(hub) == 1


@pytest.mark.parametrize("request_", ["who am I", "state", "tree"])
def test_a_hub_that_hangs_is_given_up(student, request_):
    gives_up(student, request_)


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_", [name for name in REQUESTS if name not in {"creating", "verify", "commit", "store"}]
)
def test_a_hub_that_hangs_anywhere_is_given_up(student, request_):
    gives_up(student, request_)


@pytest.mark.parametrize("request_", ["creating", "store", "verify", "commit"])
def test_work_that_was_done_while_the_hub_hung_is_found(student, request_):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(REQUESTS[request_], "delay", times=10**6, seconds=60.0))
        publish(student, hub, HASTY)
        assert commits(hub) == 1


def test_the_time_limit_holds_after_a_refused_connection_too(student):
    with LoopbackHub([ALICE]) as hub:
        with pytest.raises(HubError, match="refused"):
            with_retries(lambda: HfApi(endpoint="http://127.0.0.1:9").whoami(token="x"), HASTY, doing="asking nobody")
        close_session()  # what the client does after it, too
        hub.faults.append(Fault(REQUESTS["who am I"], "delay", times=10**6, seconds=60.0))
        with pytest.raises(HubError, match="timed out"):
            with_retries(
                lambda: [close_session(), HfApi(endpoint=hub.endpoint).whoami(token=ALICE.token)],
                HASTY,
                doing="asking",
            )


# "verify" is not here: a second try finds the file in the store and has nothing to verify.
@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        ("who am I", "500"),
        ("creating", "dropped before"),
        ("tree", "500"),
        ("store", "500"),
        ("commit", "500"),
        ("commit", "dropped before"),
        ("commit", "429"),
    ],
)
def test_a_fault_that_stays_leaves_nothing_and_says_what_to_do(student, request_, fault):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(REQUESTS[request_], times=10**6, **FAULTS[fault]))
        with pytest.raises(HubError, match="Run the same command again later") as caught:
            publish(student, hub)
        assert "\n" not in str(caught.value)
        assert commits(hub) == 0
        hub.faults.clear()
        publish(student, hub)
        assert commits(hub) == 1


def test_a_commit_that_nobody_can_confirm_is_found_by_the_next_try(student):
    with LoopbackHub([ALICE]) as hub:
        hub.faults += [Fault(COMMIT, "drop_after", times=10**6), Fault(REQUESTS["history"], "meanwhile")]
        hub.faults.append(Fault(REQUESTS["history"], "status", times=10**6))
        with pytest.raises(HubError, match="what has arrived is found and not sent twice"):
            publish(student, hub)
        assert commits(hub) == 1
        hub.faults.clear()
        again = publish(student, hub)
        assert again.found
        assert commits(hub) == 1


def test_what_will_not_pass_is_not_tried_again(student):
    with LoopbackHub([ALICE]) as hub:
        hub.faults.append(Fault(COMMIT, "status", status=403, times=10**6))
        with pytest.raises(HubAccessError, match="write permission"):
            publish(student, hub)
        assert sum("/commit/" in request for request in hub.requests) == 1
        assert commits(hub) == 0


mixtures = st.lists(
    st.tuples(st.sampled_from(list(REQUESTS)), st.sampled_from(list(FAULTS)), st.integers(1, 6)), min_size=1, max_size=4
)


def ends_in_one_commit(student, chosen, create_pr):
    with LoopbackHub([ALICE]) as hub:
        if create_pr:
            hub.add_repository("alice/student")
        hub.faults += [Fault(REQUESTS[name], times=times, **FAULTS[fault]) for name, fault, times in chosen]
        for _ in range(40):
            try:
                publish(student, hub, create_pr=create_pr)
            except HubError:
                assert commits(hub) <= 1
            else:
                break
        assert commits(hub) == 1
        if create_pr:
            assert list(hub.repository("alice/student").pull_requests) == [1]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixtures, st.booleans())
def test_any_mixture_of_faults_ends_in_exactly_one_commit(student, chosen, create_pr):
    ends_in_one_commit(student, chosen, create_pr)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixtures, st.booleans())
def test_many_mixtures_of_faults_end_in_exactly_one_commit(student, chosen, create_pr):
    ends_in_one_commit(student, chosen, create_pr)
