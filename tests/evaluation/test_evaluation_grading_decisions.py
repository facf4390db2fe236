r"""What grading decides where writers differ: tiny values, thoughts, percent signs, options, powers, ratios, units in words.

Numbers beside the rows name public reports: MV 14 is huggingface/Math-Verify#14, TRL 4563 is huggingface/trl#4563.
"""

from fractions import Fraction
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd_hf.evaluation import GradingPool
from prune_opd_hf.evaluation.grading.math_grader.equivalence import judge
from prune_opd_hf.evaluation.grading.math_grader.extraction import THOUGHT_TAGS, extract_answer, thought_opened_by

DECISIONS = [  # gold, answer, right, public report
    # tiny values
    ("2^{-98}", "2^{-99}", False, "MV 14"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False, "MV 14"),
    (r"\frac{1}{2^{98}}", r"\frac{2}{2^{99}}", True, ""),
    (r"\frac{1}{20!}", r"\frac{1}{19!}", False, ""),
    (r"\frac{1}{20!}", rf"\frac{{1}}{{{factorial(20)}}}", True, ""),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False, "MV 14"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}", False, "MV 14"),
    (r"2^{-98}\sqrt{2}", r"2^{-99}\sqrt{2}", False, ""),
    (r"2^{-98}\sqrt{2}", r"2^{-97}\frac{1}{\sqrt{2}}", True, ""),
    (r"\frac{x}{20!}", r"\frac{x}{19!}", False, ""),
    (r"\frac{x}{20!}", r"\frac{x}{20 \cdot 19!}", True, ""),
    ("(0, 2^{-98})", "(0, 2^{-99})", False, ""),
    ("[0, 2^{-98}]", "[0, 2^{-99}]", False, ""),
    (r"\{0, 2^{-98}\}", r"\{0, 2^{-99}\}", False, ""),
    ("2^{-98}, 2^{-99}", "2^{-99}, 2^{-98}", True, ""),
    (r"\begin{pmatrix}1\\2^{-98}\end{pmatrix}", r"\begin{pmatrix}1\\2^{-99}\end{pmatrix}", False, ""),
    ("x=2^{-98}", "x=2^{-99}", False, ""),
    ("2^{-98}", "a = b = 2^{-99}", False, ""),
    ("0", "10^{-30}", False, ""),
    ("0", r"\sqrt{2}\sqrt{3}-\sqrt{6}", True, ""),
    ("10^{-20}", "1e-21", False, ""),
    ("10^{-20}", "0.00000000000000000001", True, ""),
    (r"e^{\pi\sqrt{163}}", "262537412640768744", False, ""),  # which it misses by 7.5e-13
    # a decimal for what no decimal can write: six decimals, four digits
    (r"\frac{1}{6}", "0.166667", True, ""),
    (r"\frac{1}{6}", "0.16667", False, ""),
    (r"\frac{1}{90}", "0.011111", True, ""),
    (r"\frac{1}{9000}", "0.000111", False, ""),
    (r"\sqrt{5}", "2.236068", True, ""),
    ("42", r"6.0000001\cdot 7", False, ""),
    # lists, signs and sides that were taken one for the other
    ("n=2,3,4", "n=1,2,3", False, "MV 14"),
    ("D=(0,1)", "D=(0,1.5)", False, "MV 14"),
    (r"19,46,\text{ and }82", "21,36, and 82", False, "MV 14"),
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}", False, "MV 14"),
    (r"\pm 2021", "2021", False, "MV 14"),
    (r"1,2,\ldots,n", r"1,3,5,\ldots,2n-1", False, "MV 14"),
    (r"1:2:3:\ldots", r"1:4:9:\ldots", False, "MV 14"),
    # percent: the sign or word may stand on one side alone; the number, or what it is worth
    (r"12.5\%", "12.5", True, "MV 67"),
    ("12.5", r"12.5\%", True, ""),
    (r"12.5\%", "12.5 percent", True, "MV 67"),
    (r"12.5\%", r"12.5 \text{ per cent}", True, ""),
    (r"12.5\%", r"\frac{25}{2}", True, ""),
    (r"12.5\%", "0.125", True, ""),
    (r"12.5\%", r"\frac{1}{8}", True, ""),
    (r"12.5\%", r"1250\%", False, ""),
    (r"12.5\%", r"0.125\%", False, ""),
    (r"28\%", "28", True, "MV 67"),
    (r"10\%", "1", False, ""),
    (r"10\%, 20\%", r"20\%, 10\%", True, ""),
    (r"10\%, 20\%", "10, 20", True, ""),
    (r"10\%, 20\%", "10, 30", False, ""),
    # words behind a number are its unit, unless they change it
    ("13", r"\text{13}", True, "MV 37"),
    ("27", r"\text{27 ways}", True, ""),
    ("27", "27 ways in total", True, ""),
    ("27", r"\text{27 or 28}", False, ""),
    ("27", r"\text{27 thousand}", False, ""),
    ("3", r"\text{3 hours 24 minutes}", False, ""),
    # the letter of an option before its value
    ("5", "A) 5", True, ""),
    ("5", "A. 5", True, ""),
    ("5", r"\text{A) } 5", True, ""),
    ("5", "B) 6", False, ""),
    ("A", "A) 5", True, ""),
    ("A", "B) 5", False, ""),
    (r"\text{(C)}", r"\textbf{(C)}\ 204", True, ""),
    (r"\text{(C)}", r"\textbf{(D)}\ 204", False, ""),
    (r"\text{Evelyn}", r"\text{(B) Evelyn}", True, ""),
    # powers
    ("1024", "2**10", True, ""),
    ("1024", "2 ** 10", True, ""),
    ("1024", "2^10", True, ""),
    ("20", "2^10", False, ""),  # 2^{1}0
    ("64", "2**3**2", False, ""),
    ("5", "**5**", True, ""),
    (r"\frac{1}{8}", "2**-3", True, ""),
    # roots with a bracket for a brace, and of letters that may be negative
    (r"4\sqrt{2}", r"4\sqrt(2)", True, "MV 41"),
    (r"4\sqrt{2}", r"4 \sqrt (2)", True, "MV 41"),
    ("4", r"4\sqrt(2)", False, "MV 41"),
    (r"\frac{2}{\sqrt{3}}", r"\frac{2}{\sqrt(3)}", True, ""),
    (r"\sqrt{x+1}(x-1)", r"\sqrt(x+1)(x-1)", True, ""),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}", False, "MV 64, limit"),
    ("x", r"\sqrt{x^2}", False, "limit"),
    # mixed numbers, lines, a value written long, a half-open interval
    ("2", "2 2/3", False, "MV 81"),
    ("10", "4 10/3", False, "MV 81"),
    ("2.5", r"2\frac{1}{2}", True, "MV 34"),
    ("5/4", "1 1/4", True, "MV 34"),
    ("3*x-1*y+13=0", "3x + 4y + 14=0", False, "MV 60"),
    ("34x+45y-20z+100=0", "-34x-45y+20z-100=0", True, "MV 2"),
    (r"\tan^2(y)+1", r"\sec^2(y)", True, "MV 2"),
    ("004", "4", True, "MV 44"),
    (r"a=1 \text{ or } a=-2", "a=1", False, "ms-swift 4541"),
    # fractions as they are written, an option alone
    ("2/3", r"\frac{2}{3}", True, "MV 1"),
    (r"\frac12", r"\frac{1}{2}", True, "MV 35"),
    (r"\dfrac{9}{7}", "9/7", True, "MV 70"),
    (r"28\%", "28 pct", True, "MV 61"),
    (r"28\%", "28 percentage", True, "MV 61"),
    ("A", "A", True, "MV 16"),
    # what is said to be near
    ("27", r"\approx 27", True, ""),
    ("27", r"x \approx 27", True, ""),
    ("27", r"\text{approximately } 27", True, ""),
    ("27", r"27.3 \approx 27", False, ""),
    ("27", r"\approx 28", False, ""),
    # times and ratios
    ("4:6:8", "2:3:4", True, ""),
    ("4:6:8", "2 : 3 : 4", True, ""),
    ("4:6:8", "2:3:5", False, ""),
    ("4:6:8", "8:6:4", False, ""),
    ("12:00", "1:00", False, "MV 14"),
    ("5:30", "1:6", False, ""),
    ("5:30", r"\frac{1}{6}", False, ""),
    ("1:12", "2:24", False, "limit"),
]


@pytest.mark.parametrize(("gold", "answer", "right", "report"), DECISIONS)
def test_verdict(gold, answer, right, report):
    assert judge(answer, gold).correct is right


FOUND = [
    (r"<think>\boxed{4}? No.</think>It is \boxed{5}.", "5"),  # TRL 4563
    (r"<think>It is \boxed{4}</think>The answer is 5.", "5"),
    (r"<think>It is \boxed{4}</think>", None),
    (r"<think>It is \boxed{4} and", None),  # TRL 4563
    (r"It is \boxed{4}.</think>", None),  # the template opened the thought
    (r"It is \boxed{4}.</think>It is \boxed{5}.", "5"),
    (r"<think>a</think>It is \boxed{4}. <think>Or", None),
    (r"[THINK]\boxed{4}[/THINK]\boxed{5}", "5"),
    (r"I think < 5, so \boxed{4}", "4"),
    (r"$\boxed 5$.", "5"),
    (r"\boxed 27 ways", "27"),
    (r"\boxed5", "5"),
    (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
    (r"\(\boxed -3\)", "-3"),
    (r"\boxed C", "C"),
    (r"\boxed{4}, or \boxed 5.", "5."),  # its full stop is no part of the value
    (r"\boxed{x = \boxed 5}", r"x = \boxed 5"),
    (r"\boxed{4}: the answer stands in \boxed as asked", "4"),
    (r"\framebox{5}", "5"),
    (r"\framebox[3cm][c]{5}", "5"),
    (r"\boxed{4}, \framebox{5", None),
    (r"so \fbox{5}", "5"),  # lm-evaluation-harness 3116
    # Markdown's marks around an answer, and other ways to mark one
    ("So it is.\n\n✅ Final Answer: **73**", "73"),  # MV 76
    ("**The answer is 73.**", "73."),
    ("Answer: *42*", "42"),
    ("The answer is `42`.", "42"),
    ("The answer is 2**10.", "2**10"),
    ("48 / 2 = 24, and 24 + 48 = 72.\n#### 72", "72"),
    ("#### 2. Compute\nIt is 5.", None),  # a heading
    ("<answer>42</answer>", "42"),  # maxtext 4150
    (r"Both \boxed{4}. <answer>It is \boxed{5}</answer> Done.", "5"),
    ("I am to answer in <answer></answer> tags. The answer is 5.", "5"),
    ("<answer>Neither one thing\nnor another</answer>", None),
]


@pytest.mark.parametrize(("response", "answer"), FOUND)
def test_the_answer_is_found_behind_the_thought_and_in_every_kind_of_box(response, answer):
    assert extract_answer(response) == answer


# GSM8K's column "answer" and MATH's "solution" (Math-Verify#70) are whole solutions: every response was wrong
@pytest.mark.parametrize(
    "gold",
    [
        "72",
        "48 / 2 = <<48/2=24>>24\n48 + 24 = <<48+24=72>>72\n#### 72",
        r"Half of 48 is \boxed{24}. With $48+24=72$, it is \boxed{72}.",
    ],
)
def test_a_gold_may_be_a_whole_solution(gold):
    with GradingPool(1) as pool:
        assert [verdict.correct for verdict in pool.grade([r"\boxed{72}", r"\boxed{24}"], [gold] * 2)] == [True, False]


def test_boxes_that_a_gold_lists_are_one_answer():
    responses = [r"\boxed{24, 72}", r"\boxed{72} and \boxed{24}", r"\boxed{72}", r"\boxed{24}"]
    with GradingPool(1) as pool:
        verdicts = pool.grade(responses, [r"$48+24=72$. So \boxed{24} and \boxed{72}."] * len(responses))
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False]


@settings(max_examples=200)
@given(thought=st.text("ab \\boxed{1}$\n", max_size=60), behind=st.text("xy ", max_size=9))
def test_no_thought_whatever_it_holds_changes_the_answer_behind_it(thought, behind):
    for opening, closing in THOUGHT_TAGS:
        response = f"{behind}\\boxed{{5}}"
        assert extract_answer(f"{opening}{thought}{closing}{response}") == "5"
        assert extract_answer(f"{thought}{closing}{response}") == "5"
        assert extract_answer(f"{response}{opening}{thought}") is None


def test_a_thought_that_the_prompt_has_opened_is_seen():
    assert thought_opened_by("<|assistant|>\n<think>\n") == "<think>"
    assert thought_opened_by("<|assistant|>\n<think>\n\n</think>\n\n") == ""
    assert thought_opened_by("Write your reasoning in <think> tags.<|assistant|>") == ""


def latex(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@settings(max_examples=60)
@given(
    numerators=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    exponents=st.tuples(st.integers(-400, 400), st.integers(-400, 400)),
    factor=st.sampled_from(["", r"\sqrt{2}", r"\pi"]),
)
def test_values_of_any_size_are_equal_only_if_they_are(numerators, exponents, factor):
    gold, answer = (rf"{n} \cdot 2^{{{e}}}{factor}" for n, e in zip(numerators, exponents, strict=True))
    first, second = (n * Fraction(2) ** e for n, e in zip(numerators, exponents, strict=True))
    assert judge(answer, gold).correct is (first == second)
    assert judge(latex(first) + factor, gold).correct
    assert not judge(latex(first * Fraction(10**9 + 1, 10**9)) + factor, gold).correct


def test_tiny_values_are_counted_apart():
    values = [
        r"2^{-98}\sqrt{2}",
        r"2^{-99}\sqrt{2}",
        r"2^{-98}\pi",
        "2^{-98}",
        "2^{-99}",
        "0",
        r"\sqrt{2}\sqrt{3}-\sqrt{6}",
    ]
    votes = [judge(value, "977").canonical for value in values]
    assert len(set(votes)) == len(values) - 1
    assert votes[-2] == votes[-1] == "0"


@settings(max_examples=40)
@given(hundredths=st.integers(1, 10**6), sign=st.sampled_from([r"\%", "%", " percent", r"\text{ percent}", r"\,\%"]))
def test_a_percentage_is_its_number_and_its_value_and_no_other_percentage(hundredths, sign):
    number = Fraction(hundredths, 100)
    written = f"{hundredths // 100}.{hundredths % 100:02d}"
    gold = written + sign
    assert judge(written, gold).correct
    assert judge(latex(number), gold).correct
    assert judge(latex(number / 100), gold).correct
    assert judge(gold, written).correct
    assert not judge(latex(number * 100) + sign, gold).correct
    assert not judge(latex(number / 100) + sign, gold).correct
    assert not judge(latex(number + 1), gold).correct


@settings(max_examples=40)
@given(parts=st.lists(st.integers(1, 9), min_size=2, max_size=4), scale=st.integers(1, 20), place=st.integers(0, 3))
def test_a_ratio_is_what_is_proportional_to_it(parts, scale, place):
    gold = ":".join(map(str, parts))
    scaled = [part * scale for part in parts]
    assert judge(":".join(map(str, scaled)), gold).correct
    scaled[place % len(scaled)] += 1
    assert not judge(":".join(map(str, scaled)), gold).correct


CHANGING = ["factorial", "squared", "cubed", "thousand", "million", "billion", "trillion", "dozen", "hundred", "halves"]
CHANGING += ["thirds", "quarters", "tenths", "hundredths", "times", "or more", "at least", "modulo", "choose", "wrong"]


@pytest.mark.parametrize("word", CHANGING)
def test_a_word_that_changes_a_number_is_no_unit(word):
    for answer in (f"27 {word}", rf"27\text{{ {word}}}", rf"\text{{27 {word}}}"):
        assert not judge(answer, "27").correct


@pytest.mark.parametrize("letter", "ABCDE")
def test_an_option_is_its_letter_or_its_value(letter):
    for lead in (f"{letter}) ", f"({letter}) ", f"{letter}. ", rf"\text{{({letter})}} ", rf"\textbf{{{letter})}}\ "):
        assert judge(f"{lead}204", "204").correct
        assert judge(f"{lead}204", letter).correct
        assert judge(f"{lead}-204", "-204").correct
        assert not judge(f"{lead}205", "204").correct
        assert not judge(f"{lead}204", "F").correct
