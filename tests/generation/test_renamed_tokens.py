"""Ids that do not count, against the oracle: as if both models had no logits there (trl 4562, trl 3028, R1 30)."""

import pytest
import torch
from generation_helpers import CONFIG, generate, oracle, padded_prompts
from oracle import assert_record_equals, full_log_probs
from tiny_models import tiny_model
from torch import nn

from prune_opd_hf import DriftConfig, DriftMonitor, DriftStoppingCriteria, Rollouts, Teacher
from prune_opd_hf.errors import ConfigError, InputError, VocabularyMismatchError
from prune_opd_hf.generation import LoopEngine, Request, Sampling, watch
from prune_opd_hf.models import vocabulary
from prune_opd_hf.models.vocabulary import id_tensor
from prune_opd_hf.teachers import local
from prune_opd_hf.teachers.base import unshared_ids

EXCLUDED = (5, 6, 7, 11, 30, 40)


class Without(nn.Module):
    """A model whose logits are -inf at the excluded ids."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits[..., list(EXCLUDED)] = -torch.inf
        return output


def likely(model):
    """The same, but left alone it says little else than the excluded tokens."""
    with torch.no_grad():
        model.get_output_embeddings().bias[list(EXCLUDED)] += 4.0
    return model


@pytest.fixture
def pair():
    return likely(tiny_model("qwen3", 1)), likely(tiny_model("qwen3", 2))


def restricted(teacher, top_k=4):
    scorer = Teacher(teacher, top_k=top_k)
    scorer.restrict_vocabulary(48, EXCLUDED)
    return scorer


@pytest.mark.parametrize("metric", ["overlap", "mass", "nucleus"])
@pytest.mark.parametrize("way", ["hooks", "loop", "criterion"])
def test_what_is_recorded_equals_full_passes_without_these_ids(pair, metric, way):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4])
    ids[0, -1] = 11  # a prompt may hold one: each model reads its own meaning
    config = DriftConfig(metric=metric, top_k=4, threshold=0.5, weight_drop=0.25)
    arguments = {"max_new_tokens": 25, "suppress_tokens": list(EXCLUDED)}
    untouched = generate(student, ids, mask, **arguments)
    assert not torch.isin(untouched[:, 5:], torch.tensor(EXCLUDED)).any()
    assert torch.isin(generate(student, ids, mask, max_new_tokens=25)[:, 5:], torch.tensor(EXCLUDED)).any()
    if way == "criterion":
        watcher = DriftStoppingCriteria(
            restricted(teacher), config, student=student, check_every=4, attention_mask=mask
        )
        sequences = generate(student, ids, mask, stopping_criteria=[watcher], **arguments)
    else:
        watcher = DriftMonitor(restricted(teacher), config, check_every=4, attention_mask=mask)
        sequences = generate(student, ids, mask, watcher, loop=way == "loop", **arguments)
    rollouts = watcher.finish(sequences)
    assert_record_equals(rollouts, oracle(Without(student), Without(teacher), ids, mask, untouched, metric=metric))
    assert rollouts.excluded_ids == EXCLUDED


@pytest.mark.parametrize("way", ["hooks", "loop", "scored student"])
def test_they_are_copied_to_the_device_as_often_for_many_tokens_as_for_few(monkeypatch, pair, way):
    student, (ids, mask) = pair[0], padded_prompts([5, 3, 4])
    teacher, made = restricted(pair[1]), []
    monitor = DriftMonitor(
        teacher, CONFIG, check_every=1, truncate=False, student=student if way == "scored student" else None
    )
    for module in (vocabulary, local, watch):
        monkeypatch.setattr(module, "id_tensor", lambda *given: made.append(given) or id_tensor(*given), raising=False)
    counts = []
    for tokens in (2, 12):
        made.clear()
        arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "suppress_tokens": list(EXCLUDED)}
        generate(student, ids, mask, monitor, loop=way == "loop", **arguments)
        counts.append(len(made))
    assert counts[0] == counts[1] <= 2


def test_those_that_the_student_has_no_logits_for_are_no_matter():
    student, teacher = tiny_model("qwen3", 1, vocab_size=40), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4], vocab=40)
    monitor = DriftMonitor(restricted(teacher), CONFIG, check_every=4, attention_mask=mask)  # 40 is among the excluded
    sequences = generate(student, ids, mask, monitor, max_new_tokens=6, suppress_tokens=list(EXCLUDED))
    assert monitor.finish(sequences).excluded_ids == EXCLUDED[:-1]


@pytest.mark.parametrize("slots", [1, 3])
def test_an_engine_never_samples_them(pair, slots):
    student, teacher = pair
    scorer = restricted(teacher)
    assert unshared_ids(scorer, 50) == (*EXCLUDED, 48, 49)
    sampling = Sampling(12, (1,), 0, suppress_tokens=unshared_ids(scorer, 48))
    requests = [Request((3, 4, 9), seed=seed) for seed in range(8)]
    monitor = DriftMonitor(scorer, CONFIG, check_every=4, truncate=False, eos_token_id=1, pad_token_id=0)
    watch = monitor.begin()
    completions = sorted(LoopEngine(student, sampling, slots=slots).generate(requests, watch))
    assert not {token for completion in completions for token in completion.token_ids} & {*EXCLUDED}
    rollouts = watch.rollouts()
    ids, mask = torch.tensor([[3, 4, 9]] * 8), torch.ones(8, 3, dtype=torch.long)
    sequences = torch.cat([ids, rollouts.response_ids], dim=1)
    rows = [
        oracle(
            Without(student), Without(teacher), ids[[row]], mask[[row]], sequences[[row], : 3 + length], truncate=False
        )[0]
        for row, length in enumerate(rollouts.lengths.tolist())
    ]
    assert_record_equals(rollouts, rows)


def test_rows_at_a_pace_of_their_own_are_scored_without_them(pair):
    _, teacher = pair
    prompt, response = torch.tensor([3, 11, 4]), torch.tensor([8, 9, 20, 21, 22, 9])
    expected = full_log_probs(Without(teacher), prompt, response).float()
    rows = restricted(teacher).follow_rows()
    rows.start_row(0, prompt.tolist())
    for span in (slice(0, 4), slice(4, 6)):
        tokens = response[span].unsqueeze(0)
        scores = rows.score([0], tokens, wanted=torch.ones_like(tokens, dtype=torch.bool))
        assert scores.topk_ids[0].tolist() == expected[span].topk(4).indices.tolist()
        torch.testing.assert_close(
            scores.token_log_probs[0], expected[span].gather(-1, tokens[0, :, None])[:, 0], atol=2e-4, rtol=1e-4
        )


def test_a_response_with_such_a_token_is_refused_with_the_remedy(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    monitor = DriftMonitor(restricted(teacher), CONFIG, check_every=4, attention_mask=mask)
    with pytest.raises(InputError, match=r"is outside the teacher's vocabulary of 42: .*\(suppress_tokens\)"):
        generate(student, ids, mask, monitor, max_new_tokens=25)


def test_ids_are_only_ever_taken_away_and_enough_for_the_top_k_must_stay():
    teacher = Teacher(tiny_model("qwen3", 2), top_k=4)
    teacher.restrict_vocabulary(20, [3, 19, 30])
    teacher.restrict_vocabulary(10, [7])
    assert (teacher.vocab_size, teacher.excluded_ids) == (10, (3, 7))
    with pytest.raises(ConfigError, match="top_k is 4, above the 3 tokens that both models share"):
        teacher.restrict_vocabulary(4)


class Words:
    def __init__(self, *changes):
        self.vocab = {dict(changes).get(index, f"word{index}"): index for index in range(48)}
        self.added_tokens_decoder = dict.fromkeys((5, 6))

    def get_vocab(self):
        return self.vocab


def test_a_monitor_compares_tokenizers_and_names_what_it_leaves_out(pair, caplog):
    _, teacher = pair
    tokenizers = {"tokenizer": Words(), "teacher_tokenizer": Words((6, "<x>"))}
    with pytest.raises(VocabularyMismatchError, match="set allow_renamed_special_tokens"):
        DriftMonitor(teacher, CONFIG, **tokenizers)
    monitor = DriftMonitor(teacher, CONFIG, **tokenizers, allow_renamed_special_tokens=True)
    assert monitor.teacher.excluded_ids == (6,)
    assert "token id 6 is 'word6' for the student and '<x>' for the teacher" in caplog.text
    tokenizers["teacher_tokenizer"] = Words((6, "<x>"), (9, "<y>"))
    with pytest.raises(VocabularyMismatchError, match="token id 9"):
        DriftMonitor(teacher, CONFIG, **tokenizers, allow_renamed_special_tokens=True)


def test_stored_rollouts_say_which_ids_did_not_count_and_do_not_mix_with_others(pair, tmp_path):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    records = []
    for scorer in (restricted(teacher), Teacher(teacher, top_k=4)):
        monitor = DriftMonitor(scorer, CONFIG, attention_mask=mask)
        arguments = {"max_new_tokens": 6, "suppress_tokens": list(EXCLUDED)}
        records.append(monitor.finish(generate(student, ids, mask, monitor, **arguments)))
    records[0].save(tmp_path / "rollouts.safetensors")
    assert Rollouts.load(tmp_path / "rollouts.safetensors").excluded_ids == EXCLUDED
    assert records[0].select([0]).excluded_ids == EXCLUDED
    assert Rollouts.cat([records[0], records[0]]).excluded_ids == EXCLUDED
    with pytest.raises(InputError, match="excluded_ids"):
        Rollouts.cat(records)
