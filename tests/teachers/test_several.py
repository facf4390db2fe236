"""Several teachers as one: rows are scored by their own, whatever leaves and in whatever order."""

import pytest
import torch
from generation_helpers import padded_prompts
from tiny_models import tiny_model

from prune_opd_hf import DriftConfig, Teacher
from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.generation import DriftMonitor
from prune_opd_hf.teachers.several import SeveralTeachers

K, NAMES = 4, ("a", "b", "b", "a")


@pytest.fixture(scope="module")
def models():
    return {"a": tiny_model("llama", 1), "b": tiny_model("qwen3", 2)}


def several(models):
    return SeveralTeachers({name: Teacher(model, top_k=K) for name, model in models.items()})


def test_teachers_with_different_numbers_of_candidates_are_refused(models):
    teachers = {name: Teacher(model, top_k=width) for (name, model), width in zip(models.items(), (4, 8), strict=True)}
    with pytest.raises(ConfigError, match=r"must have one top_k, got {'a': 4, 'b': 8}"):
        SeveralTeachers(teachers)


# It was an IndexError
def test_scores_before_the_first_batch_are_refused(models):
    with pytest.raises(MonitorStateError, match=r"no prompts yet: call start"):
        several(models).score(responses_of())


def alone(models, ids, mask, responses, name):
    teacher = Teacher(models[name], top_k=K)
    teacher.start(ids, mask)
    return teacher.score(responses)


def responses_of(rows=4, time=6):
    return torch.randint(3, 48, (rows, time), generator=torch.Generator().manual_seed(3))


def assert_rows(scores, expected, rows):
    for line, row in enumerate(rows):
        torch.testing.assert_close(scores.token_log_probs[line], expected[NAMES[row]].token_log_probs[row])
        assert torch.equal(scores.topk_ids[line], expected[NAMES[row]].topk_ids[row])


@pytest.mark.parametrize("one_has_two_names", [False, True])
def test_each_row_is_scored_by_its_own_also_after_rows_have_left(models, one_has_two_names):
    ids, mask = padded_prompts((3, 9, 1, 12))
    responses, together = responses_of(), several(models)
    if one_has_two_names:
        together = SeveralTeachers({**together.teachers, "c": together.teachers["a"]})
    first = {name: alone(models, ids, mask, responses[:, :3], name) for name in models}
    whole = {name: alone(models, ids, mask, responses, name) for name in models}
    together.start(ids, mask, names=(*NAMES[:3], "c" if one_has_two_names else "a"))
    assert_rows(together.score(responses[:, :3]), first, range(4))
    kept = [3, 1, 2]
    together.keep_rows(torch.tensor(kept))
    rest = together.score(responses[kept, 3:])
    for line, row in enumerate(kept):
        torch.testing.assert_close(
            rest.token_log_probs[line], whole[NAMES[row]].token_log_probs[row, 3:], atol=1e-5, rtol=0
        )


def test_a_watch_knows_that_one_of_several_is_the_student(models):
    """Its passes are then kept from disturbing the student's, as those of an only teacher are."""
    for student, roles in ((models["a"], ("student", "teacher")), (tiny_model("llama", 3), ("student",))):
        config = DriftConfig("overlap", K, 0.5, 0.25)
        monitor = DriftMonitor(several(models), config, eos_token_id=1, pad_token_id=0, student=student)
        assert monitor.begin(ragged=True)._of_student == roles


def test_rows_at_a_pace_of_their_own_are_scored_by_their_own(models):
    ids, mask = padded_prompts((3, 9, 1, 12))
    responses, rows = responses_of(), several(models).follow_rows()
    whole = {name: alone(models, ids, mask, responses, name) for name in models}
    for row in (2, 0, 3):
        rows.start_row(row, ids[row][mask[row].bool()].tolist(), names=[NAMES[row]])
    rows.drop_rows([0])
    wanted = torch.ones(2, 6, dtype=torch.bool)
    scores = rows.score([3, 2], responses[[3, 2]], wanted=wanted)
    for line, row in enumerate((3, 2)):
        torch.testing.assert_close(
            scores.token_log_probs[line], whole[NAMES[row]].token_log_probs[row], atol=1e-5, rtol=0
        )


def test_what_one_cannot_do_or_does_not_know_none_does(models):
    together = several(models)
    together.teachers["b"].restrict_vocabulary(40, [5])
    assert (together.vocab_size, together.excluded_ids) == (40, (5,))
    together.restrict_vocabulary(30, [7])
    assert [one.vocab_size for one in together.teachers.values()] == [30, 30]
    assert [one.excluded_ids for one in together.teachers.values()] == [(5, 7), (5, 7)]
    assert together.capabilities.gives_full_logits
    assert not together.capabilities.adds_rows


def test_rows_without_a_name_and_names_without_a_teacher_are_refused(models):
    together, (ids, mask) = several(models), padded_prompts((3, 4))
    with pytest.raises(InputError, match=r"there is no teacher 'c'; there are a, b"):
        together.start(ids, mask, names=["a", "c"])
    with pytest.raises(InputError, match="2 rows have 0 names of teachers"):
        together.start(ids, mask)
    with pytest.raises(MonitorStateError, match="rows cannot join"):
        together.add_rows(ids, mask)


def test_an_error_names_the_row_among_all(models):
    broken = tiny_model("qwen3", 2)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = float("nan")
    together, (ids, mask) = several({**models, "b": broken}), padded_prompts((3, 4, 5, 2))
    together.start(ids, mask, names=("a", "a", "b", "a"))
    with pytest.raises(NonFiniteLogitsError) as found:
        together.score(responses_of(time=2))
    assert (found.value.row, found.value.token) == (2, 0)
