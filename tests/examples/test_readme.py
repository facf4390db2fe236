"""README's snippets run as they stand, with tiny models in place of those that they name."""

import re
from pathlib import Path

from tiny_models import tiny_model
from tiny_tokenizers import byte_tokenizer

from prune_opd_hf.models.prompts import PromptEncoder

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def snippet(begins_with):
    return next(code for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if begins_with in code)


def test_the_first_snippet_runs_and_each_of_its_prompts_begins_once(tmp_path, capsys, monkeypatch):
    tokenizer = byte_tokenizer()
    code = snippet("import torch")
    for name in set(re.findall(r"Qwen/[\w.-]+", code)):
        folder = tmp_path / name
        tiny_model("qwen3", 1, vocab_size=262, pad=None).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        code = code.replace(name, str(folder))
    code = code.replace('device_map="cuda"', 'device_map="cpu"').replace("4096", "4").replace("1024", "0")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    rollouts = names["rollouts"]
    assert len(rollouts) == 2
    assert (tmp_path / "rollouts.safetensors").is_file()
    for row, prompt in enumerate(names["prompts"]):
        ids = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
        assert ids == PromptEncoder(tokenizer)([{"role": "user", "content": prompt}])
        assert ids.count(tokenizer.bos_token_id) == 1
