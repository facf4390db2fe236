"""The student of the real pair: the teacher without three layers, and a few steps of fine-tuning on what the teacher wrote.

    python examples/real_pair/cold_start.py

Without those steps it writes broken English, and what it is to learn is English rather than anything that drift could show.
Beside the models lie prompts.jsonl and held_out.jsonl, about topics that the prompts never name.
"""

import argparse
import json
from pathlib import Path

import torch
from prompts import questions
from smollm2 import FOLDER, prepare, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd_hf.records.files import write_text

DROPPED = (16, 17, 18)
PROMPTS = {"prompts.jsonl": (240, False), "held_out.jsonl": (60, True)}
"""Files beside the models: how many questions, and whether they are held out."""

STEPS, BATCH, TOKENS, LEARNING_RATE = 8, 16, 64, 2e-4


def teacher_samples(teacher, tokenizer, texts: list[str], seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of one sample to each question."""
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    torch.manual_seed(seed)
    sequences = teacher.generate(
        **batch, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id
    )
    found = []
    for prompt, response in zip(rows, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
        found.append((prompt, response[:end]))
    return found


def cold_start(folder: Path = FOLDER, seed: int = 0) -> tuple[Path, Path]:
    """Teacher and fine-tuned student as folders; what is there already stays."""
    teacher_path, without = prepare(folder, DROPPED)
    for name, (count, held_out) in PROMPTS.items():
        asked = ({"prompt": [{"role": "user", "content": text}]} for text in questions(count, held_out))
        write_text(folder / name, "".join(f"{json.dumps(row)}\n" for row in asked))
    student_path = folder / "cold_started"
    if student_path.exists():
        return teacher_path, student_path
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher, student = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher_path, without))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    texts = questions(200, held_out=False)
    for step in range(STEPS):
        asked = [texts[(step * BATCH + row) % len(texts)] for row in range(BATCH)]
        samples = teacher_samples(teacher, tokenizer, asked, seed=1000 * seed + step)
        width = max(len(prompt) + len(response) for prompt, response in samples)
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels, mask = torch.full((BATCH, width), -100), torch.zeros(BATCH, width, dtype=torch.long)
        for row, (prompt, response) in enumerate(samples):
            both = len(prompt) + len(response)
            ids[row, :both] = torch.tensor(prompt + response)
            labels[row, len(prompt) : both] = torch.tensor(response)
            mask[row, :both] = 1
        loss = student(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f}", flush=True)
    save(student.eval(), tokenizer, student_path)
    return teacher_path, student_path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    for path in cold_start(parser.parse_args().folder):
        print(path)
