"""The parts of a card that are run: the usage snippet, and the commands that measure its numbers again."""

import json
import shlex
from collections.abc import Sequence

from prune_opd_hf.evaluation.report import EvaluationReport
from prune_opd_hf.publishing.card_template import shell
from prune_opd_hf.publishing.markdown import Markdown, clean_line, fence


def snippet(repo_id: str | None, prompt: str | None, max_new_tokens: int, *, chat: bool) -> Markdown:
    """Code that loads the student with plain Transformers and asks it one thing; names enter as Python literals."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {literal(repo_id or '.')}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        "",
    ]
    lines.append(f"prompt = {literal(prompt or 'What is 12 * 34?')}")
    if chat:
        lines += [
            'messages = [{"role": "user", "content": prompt}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)']
    lines += [
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fence("\n".join(lines), "python")


def snippet_length(reports: Sequence[EvaluationReport]) -> int:
    """How many tokens the snippet allows: what the student was evaluated with, within reason."""
    return min(1024, reports[0].sampling.max_new_tokens) if reports else 512


def repeat_commands(reports: Sequence[EvaluationReport], repo_id: str | None) -> Markdown | None:
    """The commands that measure this student's scores again."""
    commands = []
    for report in reports:
        sampling = report.sampling
        words = ["prune-opd", "evaluate", repo_id or ".", "--benchmarks"]
        words += [clean_line(result.name) for result in report.benchmarks]
        words += ["--samples", str(sampling.samples), "--temperature", str(sampling.temperature)]
        words += ["--top-p", str(sampling.top_p)]
        words += ["--top-k", str(sampling.top_k)] if sampling.top_k else []
        words += ["--max-new-tokens", str(sampling.max_new_tokens), "--seed", str(sampling.seed)]
        commands.append(shlex.join(words))
    return shell("\n".join(commands)) if commands else None


def literal(value: str) -> str:
    """A string literal that Python reads back as `value`, on one line and without invisible characters."""
    return json.dumps(value) if value.isascii() and value.isprintable() else repr(value)
