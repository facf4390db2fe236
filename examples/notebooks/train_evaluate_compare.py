# %% [markdown]
# # Train, evaluate, compare
#
# Two students are trained on the same prompts and seeds, one by plain on-policy distillation, one with drift pruning.
# Then both answer fresh problems, and we ask whether the difference is larger than the noise. It takes seconds on a
# CPU, with the *embedded* pair.

# %%
from prune_opd_hf import PruneOPDConfig, PruneOPDTrainer, evaluate_model
from prune_opd_hf.evaluation import compare_reports
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer

STEPS = 12  # 60 and more show the difference in earnest
tokenizer, teacher = load_tokenizer(), load_teacher()
prompts = ChainTask().dataset(STEPS * 32, seed=0)
print(prompts[0])

# %% [markdown]
# ## Train
#
# Everything but `pruning` is the same. A step is 32 prompts with one response each. The drift settings suit a
# vocabulary of 64 tokens.


# %%
def train(pruning: str) -> PruneOPDTrainer:
    args = PruneOPDConfig(
        output_dir=f"runs/{pruning}",
        pruning=pruning,
        max_steps=STEPS,
        learning_rate=5e-4,
        per_device_train_batch_size=32,
        num_generations=1,
        max_completion_length=112,
        budget_initial=112,
        budget_minimum=16,
        budget_step=16,
        budget_margin=16,
        drift_metric="overlap",
        drift_top_k=2,
        drift_threshold=0.5,
        drift_weight_drop=0.25,
        drift_min_length=0,
        check_every=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=4,
    )
    trainer = PruneOPDTrainer(load_student(), teacher, args, prompts, processing_class=tokenizer)
    trainer.train()
    return trainer


trainers = {"plain": train("none"), "pruned": train("drift")}

# %% [markdown]
# The lines name the end tokens, the sampling, the pruning and what a step is made of. Then comes one line for every
# four steps. The loss is 0 by construction (rewards of a position sum to 0); `kl` is what falls.
#
# ## What did it cost?

# %%
for name, trainer in trainers.items():
    counts, seconds = trainer.counts, sum(trainer.phase_seconds.values())
    print(f"{name:<7} {seconds:5.1f} s, {counts.generated:6,} tokens sampled, {counts.kept:6,} in the loss")

# %% [markdown]
# ## Evaluate
#
# Fresh problems, sampled answers, 95 % intervals. `output_dir` would keep the samples with their verdicts.

# %%
reports = {
    name: evaluate_model(
        model,
        ["chain"],
        processing_class=tokenizer,
        num_generations=2,
        max_completion_length=112,
        limit=64,
        slots=256,
        top_p=1.0,
        model_name=name,
    )
    for name, model in {"before": load_student(), **{name: each.model for name, each in trainers.items()}}.items()
}
for name, report in reports.items():
    print(f"{name:<7} {report['chain'].metrics['avg@2']}")

# %% [markdown]
# ## Compare
#
# Both answered the same problems, so they are compared problem by problem.

# %%
print(compare_reports(reports["plain"], reports["pruned"]).to_markdown())

# %% [markdown]
# ## Keep the student
#
# The weights, the tokenizer, and the record that a model card is made of. What is saved loads with plain
# Transformers.

# %%
student = trainers["pruned"]
student.summary(dataset="embedded", student_base="embedded", teacher="embedded").save(student.args.output_dir)
student.save_model()
print(f"prune-opd publish {student.args.output_dir} --repo-id me/my-student --license apache-2.0 --dry-run")
