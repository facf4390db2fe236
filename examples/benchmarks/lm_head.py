"""The chunked LM head against the dense way: peak memory and time of forward plus backward, with the floor beside them.

    python examples/benchmarks/lm_head.py                       # CPU, two threads, about half an hour
    python examples/benchmarks/lm_head.py --tiny                # seconds, only to see that it runs

Dense means logits for every token and id at once, then PyTorch's own operations and autograd. Random hidden states and heads:
nothing here depends on the values.

Memory. Each figure comes from a process of its own that makes the inputs, runs one tiny case, resets the kernel's high-water
mark of its resident memory (Linux) and runs the case once. Extra memory is that mark minus what was resident before. It
contains the gradients of weight and hidden states that any way must hand over; they are the floor.
Time. Dense and chunked runs take turns in one process; the ratio is that of their medians. The floor is the bare matrix products:
one to make a model's logits, and two more for the gradients of hidden states and weight; for the centred reward the logits alone,
since its gradient touches only the candidates' rows.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from prune_opd_hf.algorithm.losses import topk_policy_gradient_loss
from prune_opd_hf.algorithm.rewards import topk_rewards
from prune_opd_hf.models.chunked_head import MAX_LOGIT_ELEMENTS, candidate_log_probs, divergence_from_hidden
from prune_opd_hf.models.lm_head import HeadParameters

MEMORY_ALLOWED, TIME_ALLOWED = 1 / 8, 1.15
CASES = ("candidates, centred", "candidates, literal", "reverse KL", "forward KL", "JSD, beta 0.5")
BETA = {"reverse KL": 1.0, "forward KL": 0.0, "JSD, beta 0.5": 0.5}
WAYS = ("dense", "chunked")


@dataclass(frozen=True)
class Sizes:
    """Shapes of one run. Hidden sizes of student and teacher are the same."""

    tokens: int = 4096
    vocabulary: int = 151_936
    hidden: int = 1024
    candidates: int = 16
    max_logit_elements: int = MAX_LOGIT_ELEMENTS


TINY = Sizes(64, 2048, 32, 4, 2**15)


@dataclass(frozen=True)
class Inputs:
    """Two heads and what they are applied to; the student's parts collect gradients."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor
    teacher_log_probs: Tensor
    token_weights: Tensor
    mask: Tensor

    @classmethod
    def drawn(cls, sizes: Sizes) -> "Inputs":
        """Standard normal hidden states, and heads that give logits with a deviation of 2."""
        generator = torch.Generator().manual_seed(0)
        shape, scale = (1, sizes.tokens), 2 / sizes.hidden**0.5
        weights = [torch.empty(sizes.vocabulary, sizes.hidden).normal_(0, scale, generator=generator) for _ in range(2)]
        return cls(
            torch.randn(*shape, sizes.hidden, generator=generator).requires_grad_(),
            weights[0].requires_grad_(),
            torch.randn(*shape, sizes.hidden, generator=generator),
            weights[1],
            torch.randint(0, sizes.vocabulary, (*shape, sizes.candidates), generator=generator),
            torch.randn(*shape, sizes.candidates, generator=generator) - 10,
            torch.rand(shape, generator=generator) + 0.5,
            torch.ones(shape, dtype=torch.bool),
        )


def policy_gradient(inputs: Inputs, log_probs: Tensor, *, centered: bool) -> Tensor:
    """The trainer's loss of candidates, from their log-probabilities."""
    rewards = topk_rewards(log_probs, inputs.teacher_log_probs, inputs.mask, centered=centered)
    rewards = rewards * inputs.token_weights.unsqueeze(-1)
    return topk_policy_gradient_loss(log_probs, log_probs.detach(), rewards, inputs.mask).loss


def dense(case: str, inputs: Inputs, sizes: Sizes) -> Tensor:
    """The loss from dense logits, as lean as plain PyTorch is written."""
    if case not in BETA:
        logits = inputs.hidden @ inputs.weight.t()
        log_probs = logits.gather(-1, inputs.ids) - logits.logsumexp(dim=-1, keepdim=True)
        del logits
        return policy_gradient(inputs, log_probs, centered=case.endswith("centred"))
    log_p = (inputs.hidden @ inputs.weight.t()).log_softmax(dim=-1)
    with torch.no_grad():
        log_q = (inputs.teacher_hidden @ inputs.teacher_weight.t()).log_softmax(dim=-1)
    beta, kl = BETA[case], torch.nn.functional.kl_div
    if beta == 1:
        divergence = kl(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    elif beta == 0:
        divergence = kl(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
    else:
        log_m = torch.logaddexp(log_p + torch.tensor(1 - beta).log(), log_q + torch.tensor(beta).log())
        divergence = beta * kl(log_m, log_q, reduction="none", log_target=True).sum(dim=-1)
        divergence = divergence + (1 - beta) * kl(log_m, log_p, reduction="none", log_target=True).sum(dim=-1)
    return (divergence * inputs.token_weights).sum() / inputs.mask.sum()


def chunked(case: str, inputs: Inputs, sizes: Sizes) -> Tensor:
    """The same loss through the chunked head; it makes the student's entropy as well, which the dense way does not."""
    head, bound = HeadParameters(inputs.weight), sizes.max_logit_elements
    if case not in BETA:
        log_probs = candidate_log_probs(
            inputs.hidden, head, inputs.ids, inputs.mask, max_logit_elements=bound
        ).log_probs
        return policy_gradient(inputs, log_probs, centered=case.endswith("centred"))
    return divergence_from_hidden(
        inputs.hidden,
        head,
        inputs.teacher_hidden,
        HeadParameters(inputs.teacher_weight),
        inputs.token_weights,
        inputs.mask,
        beta=BETA[case],
        max_logit_elements=bound,
    ).loss


def products(case: str, inputs: Inputs, sizes: Sizes) -> None:
    """The matrix products that cannot be left out, and nothing else."""
    rows = max(1, sizes.max_logit_elements // sizes.vocabulary)
    logits, gradient = torch.empty(rows, sizes.vocabulary), torch.zeros(sizes.vocabulary, sizes.hidden)
    weight = inputs.weight.detach()
    for begin in range(0, sizes.tokens, rows):
        hidden = inputs.hidden.detach()[0, begin : begin + rows]
        part = torch.mm(hidden, weight.t(), out=logits[: len(hidden)])
        if case in BETA:
            teacher_hidden = inputs.teacher_hidden[0, begin : begin + rows]
            part = torch.mm(teacher_hidden, inputs.teacher_weight.t(), out=part)
        if case != "candidates, centred":
            part @ weight
            gradient.addmm_(part.t(), hidden)


def run(way: str, case: str, inputs: Inputs, sizes: Sizes) -> None:
    """Forward and backward."""
    inputs.hidden.grad = inputs.weight.grad = None
    {"dense": dense, "chunked": chunked}[way](case, inputs, sizes).backward()


def extra_bytes(way: str, case: str, sizes: Sizes, threads: int) -> int:
    """Peak resident memory of one forward and backward, above the inputs. To be called in a fresh process."""
    torch.set_num_threads(threads)
    run(way, case, Inputs.drawn(TINY), TINY)  # libraries load and warm up
    inputs = Inputs.drawn(sizes)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    before = psutil.Process().memory_info().rss
    run(way, case, inputs, sizes)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before


def memory(case: str, sizes: Sizes, threads: int) -> dict[str, int | None]:
    """Extra bytes of each way; None where the process was killed for want of memory."""
    figures: dict[str, int | None] = {}
    for way in WAYS:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_extra_bytes, args=(sender, way, case, sizes, threads))
        process.start()
        sender.close()
        try:
            figures[way] = receiver.recv()
        except EOFError:
            figures[way] = None
        process.join()
    return figures


def _send_extra_bytes(sender, way: str, case: str, sizes: Sizes, threads: int) -> None:
    sender.send(extra_bytes(way, case, sizes, threads))


def seconds(case: str, sizes: Sizes, repeats: int) -> dict[str, list[float]]:
    """Interleaved times of both ways and of the floor."""
    for way in WAYS:
        run(way, case, Inputs.drawn(TINY), TINY)
    inputs = Inputs.drawn(sizes)
    runs: dict[str, Callable[[], None]] = {way: lambda way=way: run(way, case, inputs, sizes) for way in WAYS}
    runs["floor"] = lambda: products(case, inputs, sizes)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, step in runs.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--skip", choices=("memory", "time"), default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", default=None, help="append each case's figures to this file, one JSON object a line"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = TINY if arguments.tiny else Sizes(tokens=arguments.tokens)
    gradients = (sizes.tokens + sizes.vocabulary) * sizes.hidden * 4 / 2**20
    print(
        f"{sizes.tokens} tokens, vocabulary {sizes.vocabulary}, hidden {sizes.hidden}, {sizes.candidates} candidates, float32, "
        f"{arguments.threads} thread(s); at most {sizes.max_logit_elements} logits at once; torch {torch.__version__}"
    )
    print(
        f"Gradients that any way hands over: {gradients:.0f} MiB. Allowed: memory 1/8, time {TIME_ALLOWED} of dense.\n"
    )
    for case in arguments.cases:
        record: dict[str, object] = {"case": case, "sizes": asdict(sizes), "threads": arguments.threads}
        print(case)
        if arguments.skip != "memory":
            record["extra_bytes"] = held = memory(case, sizes, arguments.threads)
            mib = {way: "killed" if held[way] is None else f"{held[way] / 2**20:,.0f} MiB" for way in WAYS}
            whole, part = held["dense"], held["chunked"]
            ratio = "-" if whole is None or part is None else f"1/{whole / max(part, 1):.1f} of dense"
            print(
                f"   extra memory   dense {mib['dense']}, chunked {mib['chunked']}: {ratio}; floor {gradients:,.0f} MiB"
            )
        if arguments.skip != "time":
            record["seconds"] = times = seconds(case, sizes, arguments.repeats)
            median = {name: statistics.median(values) for name, values in times.items()}
            print(
                f"   time           dense {median['dense']:.2f} s, chunked {median['chunked']:.2f} s: "
                f"{median['chunked'] / median['dense']:.2f} of dense; floor {median['floor'] / median['dense']:.2f}"
            )
        if arguments.output:
            with Path(arguments.output).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
