"""The drift viewer's file: what is in it equals the rollouts, nothing in it is hidden or live, and bad input costs one line."""

import base64
import dataclasses
import hashlib
import json
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from viewer_helpers import ListTokenizer, make_rollouts

from prune_opd_hf.cli import main
from prune_opd_hf.errors import InputError, VocabularyMismatchError
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.viewer import encoding, write_drift_view
from prune_opd_hf.viewer.visible import describe_tokens, visible


def blocks_of(path) -> dict[str, bytes]:
    """The data blocks of a file, found by their text and unpacked."""
    found = re.findall(r'<script type="application/x-deflate" id="([\w-]+)">([^<]*)</script>', path.read_text())
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in found}


class Octets:
    """A slow reader of planes: one number at a time, from the format's description."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def numbers(self, count, width):
        values = [
            sum(self.data[self.at + i + plane * count] << 8 * plane for plane in range(width)) for i in range(count)
        ]
        self.at += count * width
        return values


def share(code):
    return None if code == 65535 else code / 65534


def log_prob(code):
    return None if code == 65535 else -code / 1000


def assert_near(codes, read, expected, tolerance):
    """Every code, read back, lies within the tolerance of what was written."""
    assert [read(code) for code in codes] == pytest.approx(expected.flatten().tolist(), abs=tolerance)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    vocabulary=st.sampled_from([12, 300, 70_000]),
    k=st.integers(1, 4),
    shown=st.integers(1, 5),
    student=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_file_holds_the_rollouts_to_its_stated_precision(
    tmp_path_factory, lengths, vocabulary, k, shown, student, seed
):
    metric = "overlap" if student else "nucleus"
    rollouts = make_rollouts(lengths, vocabulary=vocabulary, k=k, metric=metric, student=student, seed=seed)
    path = tmp_path_factory.mktemp("view") / "drift.html"
    blocks = blocks_of(write_drift_view(rollouts, path, candidates=shown))
    header = json.loads(blocks["header"])
    ids, width, n = header["ids"], encoding.ID_BYTES, min(shown, k)
    assert header["candidates"] == n
    assert header["student"] == student
    for row, length in enumerate(lengths):
        track = Octets(blocks[f"track-{row}"])
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
        tokens = [ids[place] for place in track.numbers(len(prompt) + length, width)]
        assert tokens == prompt + rollouts.response_ids[row, :length].tolist()
        overlap, reliability, log_p, log_q, mass = (track.numbers(length, 2) for _ in range(5))
        assert_near(reliability, share, rollouts.reliability[row, :length], 1e-5)
        assert_near(log_q, log_prob, rollouts.teacher_token_log_probs[row, :length], 6e-4)
        if student:
            shared = [
                sum(float(torch.minimum(p, q).exp()) for p, q in zip(*pair, strict=True)) / float(pair[0].exp().sum())
                for pair in zip(
                    rollouts.student_topk_log_probs[row, :length],
                    rollouts.teacher_log_probs[row, :length],
                    strict=True,
                )
            ]
            assert_near(overlap, share, rollouts.overlap[row, :length], 1e-5)
            assert_near(log_p, log_prob, rollouts.token_log_probs[row, :length], 6e-4)
            assert [share(code) for code in mass] == pytest.approx(shared, abs=1e-5)
        else:
            assert set(overlap + log_p + mass) == {65535}
        assert list(track.data[track.at :]) == rollouts.drift_events[row, :length].int().tolist()
        check_candidates(rollouts, row, length, n, Octets(blocks[f"candidates-{row}"]), ids, width, student)


def check_candidates(rollouts, row, length, n, block, ids, width, student):
    """Both lists of each position, put together again from the block."""
    k = rollouts.config.top_k
    students = [[] for _ in range(length)]
    if student:
        places, log_p, log_q = (block.numbers(length * n, size) for size in (width, 2, 2))
        flags = block.numbers(length * n, 1)
        students = [[ids[place] for place in places[t * n : t * n + n]] for t in range(length)]
        assert students == rollouts.student_topk_ids[row, :length, :n].tolist()
        assert_near(log_p, log_prob, rollouts.student_topk_log_probs[row, :length, :n], 6e-4)
        assert_near(log_q, log_prob, rollouts.teacher_log_probs[row, :length, :n], 6e-4)
        teachers = [set(known) for known in rollouts.teacher_topk_ids[row, :length, :k].tolist()]
        assert flags == [int(token in teachers[t]) for t in range(length) for token in students[t]]
    ranks = block.numbers(length * n, 1)
    further = sum(rank >= 254 for rank in ranks)
    places, log_q = block.numbers(further, width), block.numbers(further, 2)
    rest = iter(zip(places, log_q, strict=True))
    tail = rollouts.student_topk_ids[row, :length, n:k].tolist() if student else [[]] * length
    for t in range(length):
        for j in range(n):
            rank, token = ranks[t * n + j], int(rollouts.teacher_topk_ids[row, t, j])
            if rank < 254:
                assert students[t][rank] == token
            else:
                place, code = next(rest)
                assert ids[place] == token
                assert (rank == 254) == (token in tail[t])
                expected = float(rollouts.teacher_topk_log_probs[row, t, j])
                assert log_prob(code) == pytest.approx(expected, abs=6e-4)
    assert block.at == len(block.data)


def test_candidates_beyond_the_compared_top_k_do_not_enter(tmp_path):
    rollouts = make_rollouts([6], k=2, recorded=5)
    header = json.loads(blocks_of(write_drift_view(rollouts, tmp_path / "drift.html"))["header"])
    assert header["candidates"] == 2
    assert header["config"]["top_k"] == 2


def test_summary_numbers_are_those_of_a_slow_loop(tmp_path):
    rollouts = make_rollouts([40, 7, 1, 120])
    header = json.loads(blocks_of(write_drift_view(rollouts, tmp_path / "drift.html"))["header"])
    for row, summary in enumerate(header["rollouts"]):
        length = int(rollouts.lengths[row])
        events = [t for t in range(length) if rollouts.drift_events[row, t]]
        spent = [t for t in range(length) if float(rollouts.reliability[row, t]) == 0]
        assert header["stops"][summary["stop"]] == rollouts.stop_reason[row]
        assert (summary["length"], summary["events"]) == (length, len(events))
        assert summary["effective"] == length - len(spent) == int(rollouts.effective_lengths[row])
        assert summary["first_event"] == (events[0] if events else None)
        assert summary["exhausted"] == (spent[0] if spent else None)
        overlap = [float(rollouts.overlap[row, t]) for t in range(length)]
        ratios = [
            float(rollouts.token_log_probs[row, t] - rollouts.teacher_token_log_probs[row, t]) for t in range(length)
        ]
        assert summary["overlap"] == pytest.approx(sum(overlap) / length, abs=1e-5)
        assert summary["log_ratio"] == pytest.approx(sum(ratios) / length, abs=2e-5)
        assert len(summary["strip"]) == encoding.BINS
        if length == 1:
            assert set(summary["strip"]) == {round(100 * overlap[0])}


@pytest.mark.parametrize(
    ("metric", "student", "chosen"),
    [
        ("overlap", True, "overlap"),
        ("weighted_overlap", True, "mass"),
        ("mass", True, "mass"),
        ("nucleus", False, "teacher"),
    ],
)
def test_the_tint_starts_with_what_the_events_come_from(tmp_path, metric, student, chosen):
    rollouts = make_rollouts([9], metric=metric, student=student)
    header = json.loads(blocks_of(write_drift_view(rollouts, tmp_path / "drift.html"))["header"])
    assert header["agreement"] == chosen


@given(st.text(st.characters(), max_size=12))
def test_visible_text_has_no_character_that_hides_or_cannot_be_written(text):
    shown = visible(text)
    shown.encode("utf-8")
    for index, character in enumerate(shown):
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert not hidden or (character in "\u200c\u200d" and index > 0)
    assert bool(shown) == bool(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("\n\n", "↵↵"),
        ("\x00\x1b\x7f\x85", "␀␛␡⟨U+0085⟩"),
        ("a\u202eb\u2066", "a⟨U+202E⟩b⟨U+2066⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("❤\ufe0f\u200d🔥", "❤\ufe0f\u200d🔥"),
        ("\u0301", "◌\u0301"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("\u3164", "⟨U+3164⟩"),
        ("x" * 203, "x" * 200 + "… (+3)"),
    ],
)
def test_what_hides_is_shown(text, shown):
    assert visible(text) == shown


def test_tokens_keep_their_blanks_and_half_characters_show_their_bytes():
    alphabet = {byte: chr(byte) for byte in range(0x21, 0x7F)} | {0x20: "Ġ", 0xF0: "ð", 0x9F: "Ł"}
    words = ["a", "Ġthe", f"{alphabet[0xF0]}{alphabet[0x9F]}", "Ġ", "<s>"]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    tokens = describe_tokens(range(5), tokenizer)
    assert [token.text for token in tokens] == ["a", " the", "⟨F0 9F⟩", " ", "<s>"]
    assert [token.fragment for token in tokens] == [False, False, True, False, False]
    assert [token.special for token in tokens] == [False, False, False, False, True]


def test_a_sentencepiece_tokenizer_keeps_its_blanks():
    words = ["▁a", "▁the", "re", "<0xE2>"]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokens = describe_tokens(range(4), PreTrainedTokenizerFast(tokenizer_object=core))
    assert [token.text for token in tokens] == [" a", " the", "re", "⟨E2⟩"]


def test_a_tokenizer_of_another_vocabulary_is_refused_with_the_first_id_it_lacks():
    with pytest.raises(VocabularyMismatchError, match="the rollouts hold token id 64, it has 64 tokens"):
        describe_tokens([3, 64, 65], load_tokenizer())


def test_no_text_of_the_rollouts_stands_in_the_file_as_such(tmp_path):
    bait = "</script><script>alert(1)</script><!--{{script}}<!--blocks-->"
    rollouts = make_rollouts([5, 4], vocabulary=8)
    path = write_drift_view(
        rollouts, tmp_path / "drift.html", tokenizer=ListTokenizer([bait] * 8), tokenizer_name=bait, source=bait
    )
    text = path.read_text()
    assert "alert(1)" not in text.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert text.count("<script") == text.count("</script>") == 2 + 2 * 2  # header and program, two blocks a rollout
    assert text.count("<title>") == 1


def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else(tmp_path):
    text = write_drift_view(make_rollouts([3]), tmp_path / "drift.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"
    assert directives["default-src"] == "'none'"
    assert not re.search(r"(src|href)=|url\(|@import|https?:", text), "something would be asked from elsewhere"
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(r'\sstyle="|\son\w+="', text)


def test_the_same_rollouts_give_the_same_bytes(tmp_path):
    first = write_drift_view(make_rollouts([5, 8]), tmp_path / "a.html").read_bytes()
    assert write_drift_view(make_rollouts([5, 8]), tmp_path / "b.html").read_bytes() == first


def test_limit_takes_the_first_rollouts(tmp_path):
    path = write_drift_view(make_rollouts([5, 8, 3]), tmp_path / "drift.html", limit=2)
    header = json.loads(blocks_of(path)["header"])
    assert [row["length"] for row in header["rollouts"]] == [5, 8]
    assert "track-2" not in blocks_of(path)


def test_numbers_that_were_not_recorded_or_are_not_finite_are_absent():
    shares = torch.tensor([0.25, float("nan"), 2.0, -1.0]).numpy()
    assert encoding.quantize_share(shares).tolist() == [round(0.25 * 65534), 65535, 65534, 0]
    logs = np.array([-1e9, float("-inf"), 1e-7, float("nan")], dtype=np.float32)
    assert encoding.quantize_log(logs).tolist() == [65534, 65534, 0, 65535]


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "rollouts.safetensors"
    make_rollouts([5, 8, 3]).save(path)
    return path


def run(capsys, *arguments):
    try:
        code = main(["view", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_view_writes_a_file_and_says_what_is_in_it(capsys, stored):
    output = stored.parent / "drift.html"
    code, out, err = run(capsys, stored, "-o", output, "--tokenizer", "embedded")
    assert (code, err) == (0, "")
    assert f"{output}: 3 rollouts, 16 tokens" in out
    assert json.loads(blocks_of(output)["header"])["tokenizer"] == "embedded"
    assert not list(stored.parent.glob(".*"))


def test_without_a_tokenizer_it_shows_ids_and_says_so(capsys, stored):
    output = stored.parent / "drift.html"
    code, _, err = run(capsys, stored, "--output", output, "--limit", 1)
    assert code == 0
    assert "token ids" in err
    header = json.loads(blocks_of(output)["header"])
    assert header["tokens"] == [f" {index}" for index in header["ids"]]


def test_the_file_may_be_read_by_those_who_may_read_other_files(capsys, stored):
    output, other = stored.parent / "drift.html", stored.parent / "other"
    run(capsys, stored, "-o", output)
    other.write_text("")
    assert output.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors"], "no rollouts file at missing.safetensors"),
        (["notes.txt"], "notes.txt is not a whole safetensors file"),
        (["."], "no rollouts file at ."),
        (["rollouts.safetensors", "-o", "taken.html"], "taken.html exists; pass --force to replace it"),
        (["missing.safetensors", "-o", "taken.html"], "taken.html exists"),  # before anything is read
        (["missing.safetensors", "--limit", "0"], "limit must be at least 1"),
        (["missing.safetensors", "-o", "notes.txt/drift.html"], "notes.txt is a file"),
        (["rollouts.safetensors", "-o", ".", "--force"], "cannot write .: it is a folder"),
        (["rollouts.safetensors", "--tokenizer", "./nowhere"], "cannot load the student './nowhere': no such folder"),
        (
            ["rollouts.safetensors", "--tokenizer", "words"],
            "words is of another vocabulary: the rollouts hold token id",
        ),
        (["rollouts.safetensors", "--limit", "0"], "limit must be at least 1, got 0"),
        (["rollouts.safetensors", "--limit", "few"], "invalid int value: 'few'"),
        (["rollouts.safetensors", "--candidates", "0"], "candidates must be at least 1, got 0"),
        ([], "the following arguments are required: --rollouts"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_overwritten(capsys, stored, monkeypatch, arguments, message):
    monkeypatch.chdir(stored.parent)
    Path("taken.html").write_text("precious")
    Path("notes.txt").write_text("no rollouts")
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained("words")
    before = sorted(Path().iterdir())
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    assert Path("taken.html").read_text() == "precious"


def test_force_replaces_and_a_failure_leaves_the_old_file(capsys, stored, monkeypatch):
    output = stored.parent / "drift.html"
    output.write_text("old")

    def broken(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "pack_candidates", broken)
        code, _, err = run(capsys, stored, "-o", output, "--force")
    assert code == 2
    assert "the disk is full" in err
    assert output.read_text() == "old"
    assert sorted(stored.parent.iterdir()) == sorted([stored, output])
    assert run(capsys, stored, "-o", output, "--force")[0] == 0
    assert output.read_text().startswith("<!doctype html>")


def test_numbers_out_of_range_are_refused(tmp_path):
    rollouts = make_rollouts([3])
    for arguments in ({"candidates": 0}, {"limit": 0}):
        with pytest.raises(InputError, match="must be at least 1, got 0"):
            write_drift_view(rollouts, tmp_path / "drift.html", **arguments)


def test_the_page_is_part_of_the_installed_package():
    """Every file of the page matches a pattern of the package data; what is missing there is missing in a wheel."""
    import prune_opd_hf

    root = Path(prune_opd_hf.__file__).parent
    settings_text = (root.parent / "pyproject.toml").read_text()
    patterns = re.findall(r'"([^"]+)"', re.search(r"^prune_opd_hf = \[(.*)\]$", settings_text, re.MULTILINE).group(1))
    matched = {path for pattern in patterns for path in root.glob(pattern)}
    assert {path for path in (root / "viewer/page").iterdir() if path.is_file()} <= matched


def test_rollouts_that_were_stored_show_what_was_stored(stored):
    loaded = Rollouts.load(stored)
    path = write_drift_view(loaded, stored.parent / "drift.html")
    direct = write_drift_view(make_rollouts([5, 8, 3]), stored.parent / "direct.html")
    assert path.read_bytes() == direct.read_bytes()


def header_of(path):
    return json.loads(blocks_of(path)["header"])


def test_a_rollout_names_its_teacher_and_what_that_read(tmp_path):
    plain = make_rollouts([3, 2])
    read = torch.tensor([[0, 6, 3, 4], [0, 0, 0, 5]])
    own = {"teacher_prompt_ids": read, "teacher_prompt_mask": read > 0}
    record = dataclasses.replace(plain, teachers=("math", "code"), **own)
    rows = header_of(write_drift_view(record, tmp_path / "page.html"))["rollouts"]
    assert [row["taught_by"] for row in rows] == ["math", "code"]
    assert [row["read"] for row in rows] == ["6 3 4", "5"]
    assert not {"taught_by", "read"} & header_of(write_drift_view(plain, tmp_path / "plain.html"))["rollouts"][0].keys()


def test_a_teacher_that_scores_its_own_candidates_alone_is_shown(tmp_path):
    """As one on a server for CPUs: overlap is known, and no candidate of the student has the teacher's probability."""
    record = dataclasses.replace(make_rollouts([3, 2]), teacher_log_probs=None)
    header = header_of(write_drift_view(record, tmp_path / "page.html"))
    assert header["student"] is False
    assert header["rollouts"][0]["overlap"] is not None
    assert header["rollouts"][0]["mass"] is None
