# %% [markdown]
# # Watch and prune a generation
#
# A student answers, a teacher with the same vocabulary reads along, and we look where the two part. Everything runs
# on a CPU in seconds, with the *embedded* pair that the package carries: chains of arithmetic modulo 10, a teacher
# that has learnt to solve them, and a student that often loses the thread.
#
# The file is a Python script in cells (`# %%`): open it as a notebook in VS Code, PyCharm or Jupyter with jupytext,
# or run it as it stands.

# %%
from pathlib import Path

import torch

from prune_opd_hf import DriftConfig, DriftMonitor, pruned_generate
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.viewer import write_drift_view

tokenizer, student, teacher = load_tokenizer(), load_student(), load_teacher()
problems = ChainTask().problems(64, seed=0, split="evaluation")
inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
print(problems[0].prompt)
print("the right trace:", problems[0].trace)

# %% [markdown]
# ## Watch, and stop nothing
#
# `truncate=False` records and lets every response run to its end. The vocabulary has 64 tokens, so two candidates are
# compared at each position; for a real vocabulary the default, 16 tokens weighted by their probability, fits.


# %%
def answer(truncate: bool):
    config = DriftConfig("overlap", top_k=2, threshold=0.5, weight_drop=0.25)
    monitor = DriftMonitor(teacher, config, check_every=8, truncate=truncate)
    torch.manual_seed(0)
    sequences = student.generate(
        **inputs, max_new_tokens=112, do_sample=True, top_k=0, custom_generate=pruned_generate, drift_monitor=monitor
    )
    return monitor.finish(sequences)


watched = answer(truncate=False)
print(watched)

# %% [markdown]
# Agreement by position: the mean overlap of those responses that get so far.

# %%
for first in range(0, watched.overlap.shape[1], 12):
    inside = watched.response_mask[:, first : first + 12]
    overlap = float(watched.overlap[:, first : first + 12][inside].mean())
    print(f"{first:4d} to {first + 11:4d}  {overlap:.2f}  {'#' * round(40 * overlap)}")


# %% [markdown]
# Agreement is gone after a dozen tokens. What happens there? In this task the right trace is known, so we can ask where
# a response leaves it, and where its first drift event is.


# %%
def ids_of(rollouts, row):
    return rollouts.response_ids[row][rollouts.response_mask[row]].tolist()


found = {"never left": 0, "event at once": 0, "event later": 0, "no event": 0}
for row, problem in enumerate(problems):
    trace = tokenizer(problem.trace)["input_ids"]
    pairs = zip(ids_of(watched, row), trace, strict=False)
    left = next((position for position, (said, right) in enumerate(pairs) if said != right), None)
    events = watched.drift_events[row].nonzero().flatten().tolist()
    if left is None:
        found["never left"] += 1
    elif not events:
        found["no event"] += 1
    else:
        found["event at once" if events[0] <= left + 1 else "event later"] += 1
print(found)

# %% [markdown]
# Most responses leave the trace with a filler word, and the next token is a drift event: the teacher knows no such
# beginning. A few get a result wrong and go on in good order. The teacher follows them, and there is no event: drift says
# whether the teacher can still judge, and not whether the answer is right.

# %% [markdown]
# ## One response, token by token
#
# Each drift event costs a quarter of the reliability. After four nothing is left, and the response would end there.

# %%
row = next(row for row in range(len(watched)) if bool(watched.drift_events[row].any()))
print(problems[row].prompt)
for position in range(int(watched.lengths[row])):
    if bool(watched.drift_events[row, position]):
        said = tokenizer.decode(watched.response_ids[row, position])
        theirs = tokenizer.decode(watched.teacher_topk_ids[row, position, 0])
        left = float(watched.reliability[row, position])
        print(f"position {position:3d}: the student says {said!r}, the teacher {theirs!r}; reliability left {left:.2f}")
        if left == 0:
            break

# %% [markdown]
# ## Prune
#
# The same random numbers, but a response ends where its reliability is used up. What is kept is the beginning of what
# came before.

# %%
pruned = answer(truncate=True)
print(pruned)
for row in range(len(pruned)):
    assert ids_of(watched, row)[: int(pruned.lengths[row])] == ids_of(pruned, row)
kept = int(pruned.lengths.sum()) / int(watched.lengths.sum())
print(f"{pruned.stop_reason.count('drift')} of {len(pruned)} were stopped by drift; {kept:.0%} of the tokens are kept")

# %% [markdown]
# ## Look at all of it
#
# The viewer is one HTML file, which needs no network.

# %%
page = Path("runs") / "drift.html"
page.parent.mkdir(exist_ok=True)
write_drift_view(pruned, page, tokenizer=tokenizer, force=True)
print(f"open {page} in a browser")
