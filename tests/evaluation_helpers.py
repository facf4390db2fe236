"""What the evaluation tests share: real benchmark files, runs to compare, and answers made to break a grader."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_opd_hf.evaluation import EvaluationReport

BENCHMARK_FILES = ("AMC23.json", "AIME24.json", "AIME25.json", "HMMT24.json", "HMMT25.json")


def benchmark_folder() -> Path:
    """The folder with the five benchmark files; the calling test is skipped where there is none."""
    named = os.environ.get("PRUNE_OPD_BENCHMARKS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    missing = [name for name in BENCHMARK_FILES if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"benchmark files not found ({', '.join(missing)}): set PRUNE_OPD_BENCHMARKS to their folder")
    return folder


def comparable(report: EvaluationReport) -> EvaluationReport:
    """Without what the clock, the number of slots and the number of processes say."""
    return replace(
        report,
        engine="",
        hardware="",
        benchmarks=tuple(replace(result, wall_seconds=0.0) for result in report.benchmarks),
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """The samples that a run wrote, in the order of the files."""
    lines = [line for path in sorted(folder.glob("samples-*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "sampling" not in record]


def adversarial_answers(count: int, seed: int = 0) -> list[str]:
    """Contents of boxes that a model might emit when it breaks, or that were made to break a grader.

    Huge nesting, exponents of up to 10^9 digits' size and towers of them, LaTeX that expands without end, control
    characters, unpaired surrogates, and soups of LaTeX commands.
    """
    rng = random.Random(seed)
    weights = {
        _token_soup: 30,
        _nested: 10,
        _deeply_nested: 10,
        _characters: 10,
        _control_characters: 10,
        _surrogates: 10,
        _numbers: 10,
        _latex_bomb: 8,
        _huge_power: 2,
    }
    makers = rng.choices(list(weights), list(weights.values()), k=max(0, count - len(_BOMBS)))
    return [*_BOMBS, *(maker(rng) for maker in makers)][:count]


_BOMBS = (
    "9^{9^{9^{9}}}",
    "10^{10^{9}}",
    "10^{1000000000}",
    "1e999999999",
    "2^{2^{2^{2^{2^{2}}}}}",
    "99999999!",
    "((9!)!)!",
    r"\binom{10^{9}}{5 \cdot 10^{8}}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}",
    r"\prod_{n=1}^{999999999} n",
    r"\int_0^{\infty} x^{x^{x}} e^{-x^{x}} \sin(x^{9}) dx",
    r"\frac{1}{" * 300 + "1" + "}" * 300,
    "1" + "+1" * 900,
    "x" + "^x" * 500,
    "(" * 900 + "1" + ")" * 900,
    "{" * 900 + "1" + "}" * 900,
    r"\sqrt{" * 280 + "2" + "}" * 280,
    "-" * 1900 + "1",
    "1" * 1990,
    "." * 1990,
    "," * 1990,
    "1," * 900 + "1",
    r"\{" * 600,
    r"\def\a{\b\b}\def\b{\c\c}\def\c{\a}\a",
    r"\newcommand{\x}{\x\x}\x",
    r"\input{/dev/zero}",
    r"\loop\iftrue\repeat",
    r"\text{" * 200 + "a" + "}" * 200,
    "9" * 4000,
    "(" * 100_000,
    r"\frac" * 20_000,
)

_TOKEN_TEXT = r"""
0 1 2 7 42 3.14 .5 1,000 x y n i e ( ) [ ] { } + - * / ^ _ = < > , ; : ! % | & ~ $ # @ ' ? ° √ π ∞ ± ½
\frac \sqrt \pi \infty \cdot \times \div \pm \le \ge \ne \in \cup \cap \left( \right) \left. \right| \{ \} \\
\sin \cos \log \ln \exp \lim \sum \int \prod \binom{5}{2} \text{or} \text{cm} \mathrm{i} \mathbf{x} ^\circ \%
\boxed{3} \begin{pmatrix} \end{pmatrix} \overline{3} \angle \to \dots \approx \equiv \pmod{7} \mid \emptyset
\frac{1}{2} \sqrt{2} ^{2} _{3} {3} (1,2) [0,1) \log_{2} \lfloor \rfloor | \\, \, \; \! \displaystyle and or
"""
_TOKENS = _TOKEN_TEXT.split()


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [
            ("(", ")"),
            ("{", "}"),
            ("[", "]"),
            (r"\frac{1}{1+", "}"),
            (r"\sqrt{1+", "}"),
            ("|", "|"),
            (r"\{", r"\}"),
            ("-(", ")"),
        ]
    )
    depth = rng.randint(1, 60)
    return opening * depth + rng.choice(["1", "x", "", "42"]) + closing * rng.randint(0, depth)


def _deeply_nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("{", "}"), (r"\{", r"\}"), ("[", "]"), ("|", "|"), (r"\left(", r"\right)")]
    )
    opening = rng.choice(["", "-", "1+", r"\sqrt", r"\frac{1}", "x^", r"\text", "2"]) + opening
    depth = rng.randint(60, 1900 // len(opening + closing))
    return opening * depth + rng.choice(["1", "x", ""]) + closing * (depth - rng.choice([0, 0, 1, depth]))


def _huge_power(rng: random.Random) -> str:
    digits = "".join(rng.choices("123456789", k=rng.choice([5, 9, 10, 100, 1000])))
    return rng.choice(
        [
            f"10^{{{digits}}}",
            f"{digits[:9]}^{{{digits}}}",
            f"7^{{7^{{{digits}}}}}",
            f"1e{digits}",
            f"1.5 \\times 10^{{-{digits}}}",
            f"{digits[:9]}!",
            f"({digits[:5]}!)!",
            f"\\sqrt[{digits}]{{2}}",
            f"\\log_{{{digits}}} 10^{{{digits}}}",
            f"\\binom{{{digits}}}{{{digits[:4]}}}",
        ]
    )


def _latex_bomb(rng: random.Random) -> str:
    n = rng.randint(2, 40)
    return rng.choice(
        [
            "".join(
                f"\\def\\{chr(97 + i % 26)}{{\\{chr(97 + (i + 1) % 26)}\\{chr(97 + (i + 1) % 26)}}}" for i in range(n)
            )
            + r"\a",
            r"\newcommand{\x}[1]{\x{#1#1}}\x{1}" * rng.randint(1, 9),
            r"\begin{matrix}" * n + "1" + r"\end{matrix}" * n,
            r"\begin{pmatrix}" + (r"1 & " * n + r"1 \\ ") * n + r"\end{pmatrix}",
            r"\left(" * n + "1" + r"\right." * n,
            r"\frac" * n + "{1}{2}" * n,
            r"\boxed{" * n + "7" + "}" * n,
            r"\text{\text{" * n + "$" * n + "}}" * n,
            r"\sum_{i=1}^{" * n + "9" + "} i" * n,
            r"\int" * n + " x dx" * n,
            r"\overset{" * n + "a" + "}{b}" * n,
            "a_" * n + "{" * n,
            "^" * n + "_" * n + "&" * n + "#" * n,
            r"\catcode`\%=12 \expandafter\csname" * n,
        ]
    )[:1990]


def _token_soup(rng: random.Random) -> str:
    return rng.choice(["", " "]).join(rng.choices(_TOKENS, k=rng.randint(1, 12)))


def _characters(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice([rng.randint(32, 0x2FF), rng.randint(0x2000, 0xD7FF)])) for _ in range(rng.randint(1, 40))
    )


def _control_characters(rng: random.Random) -> str:
    return "".join(
        rng.choice([chr(rng.randint(0, 31)), "\x7f", "\u202e", "\u200b", "4", "2", "\x00"]) for _ in range(20)
    )


def _surrogates(rng: random.Random) -> str:
    return "".join(
        rng.choice([chr(rng.randint(0xD800, 0xDFFF)), "7", r"\frac{1}{2}"]) for _ in range(rng.randint(1, 9))
    )


def _numbers(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.randint(1, 60)))
    return (
        rng.choice(["", "-", "+", "."])
        + digits
        + rng.choice(["", ".", ".5", ",000", "%", "^2", "_8", "e9", r"^{\circ}"])
    )
