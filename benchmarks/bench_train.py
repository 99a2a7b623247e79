"""DPO from TRL as it comes to grouped rows on a CPU: one epoch on the released pairs, and a step by pairs per prompt.

Run by `make bench-train`; `gpu.py` measures on a GPU. The ladder, every rung on the same model, dtype, threads, sdpa
attention, pairs, AdamW steps and clipping, each rung adding one saving:

- trl: TRL's DPOTrainer with its defaults (reference model in the loop, gradient checkpointing), batches of 4 pairs;
- trl-tuned: reference log-probabilities computed once, no checkpointing;
- pairs: prompt and response for both sides of every pair, the head on response positions only;
- sequences: each distinct prompt and response once, losses over pairs by index;
- grouped-loop: each distinct prompt once, each distinct response once, with attention that needs no mask where rows are
  still in their prompts, in the plain loop of the two rungs above;
- grouped: `GroupedDPOTrainer`, the same rows in the trainer.

An optimiser step is a fixed number of pairs of whole prompts, the same for every rung. What grouping saves depends on how
many pairs share a prompt and its responses, so of a hundred random subsets that one is timed on which it saves as much as
on the whole set; the fast rungs, for which starting up would otherwise count, on a subset four times as large. Every
measurement is a process of its own, after one untimed forward and backward pass; seconds are scaled to an epoch by pairs
and hold one pass for reference log-probabilities where a rung computes them ahead; the look of the trainer's guard, which
comes once however many pairs there are, is added as it is. Before anything is timed, the losses of
the first prompts, pair by pair in float32 and against a reference that is not the policy, must agree.

The second table takes random texts of 300 tokens a prompt and 60 a response, 16 pairs a step, from one pair per prompt to a
cross product of sixteen: what grouping saves where little is shared. The reference pass is left out of it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, answer, machine, pipes, save, start, tell
from rungs import FAST, PROMPTS, RUNGS, STEP_PAIRS, TOKENIZER_WORDS, TRAINERS, Rung
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from persodpo.config import load_profile
from persodpo.runfolder import RunFolder

THREADS = 2
CHECKED = ["trl", "pairs", "sequences", "grouped"]
TOLERANCE = 1e-4
Row = tuple[str, str, str]
#: How many times as many prompts the fast rungs are timed on.
MORE = 4
#: Subsets drawn, of which the one is taken that grouping saves as much on as on the whole set.
DRAWS = 100
#: Least factor of `grouped` against a rung.
BOUNDS = {"trl": 20.0, "pairs": 6.0}
#: Pairs per prompt -> chosen and rejected responses of its cross product.
PRODUCTS = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}
#: Pairs per prompt -> least factor of `grouped` against TRL with a precomputed reference.
STEP_BOUNDS = {1: 3.5, 16: 18.0}
PROMPT_TOKENS, RESPONSE_TOKENS = 300, 60
#: Optimiser steps of a timed run, by the kind of rung.
TIMED_STEPS = {"slow": 1, "fast": 6}


def partition(counts: list[int], target: int) -> list[list[int]]:
    """Split prompts with so many pairs into steps of exactly ``target`` pairs; the end may fill none."""
    pool, steps = list(range(len(counts))), []
    while pool:
        sums: dict[int, list[int]] = {0: []}
        for prompt in pool:
            for total in sorted(sums, reverse=True):
                if total + counts[prompt] <= target:
                    sums.setdefault(total + counts[prompt], [*sums[total], prompt])
            if target in sums:
                break
        if target not in sums:
            break
        steps.append(sums[target])
        pool = [prompt for prompt in pool if prompt not in sums[target]]
    return steps


def prepare(folder: Path, prompts: int, overrides: list[str]) -> dict[str, float]:
    """Write the subset's pairs and a tokenizer trained on all texts; return the sizes of set and subset."""
    frame = RunFolder(load_profile("release", overrides)).read("pairs/perso")
    frame = frame[frame["chosen"] != frame["rejected"]]
    # A line break keeps a token from spanning prompt and response.
    frame["prompt"] += "\n"
    texts = [text for name in ("prompt", "chosen", "rejected") for text in frame[name].unique()]
    tokenizer = ByteLevelBPETokenizer()
    special = ["<|end|>", "<|pad|>"]
    tokenizer.train_from_iterator(texts, vocab_size=TOKENIZER_WORDS, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", pad_token="<|pad|>")  # noqa: S106
    fast.save_pretrained(folder / "tokenizer")
    rows: dict[str, list[Row]] = {}
    for row in frame[["prompt", "chosen", "rejected"]].itertuples(index=False, name=None):
        rows.setdefault(row[0], []).append(row)
    tokens = dict(zip(texts, map(len, fast(texts)["input_ids"]), strict=True))
    found = {
        "all_prompts": len(rows),
        "all_pairs": sum(map(len, rows.values())),
        "saving": saving(rows.values(), tokens),
    }
    for kind, times in (("slow", 1), ("fast", MORE)):
        draws = [draw(rows, STEP_PAIRS, times * prompts, seed) for seed in range(DRAWS)]
        off = [abs(saving(flat(steps), tokens) - found["saving"]) for steps in draws]
        steps = draws[off.index(min(off))]
        (folder / f"steps-{kind}.json").write_text(json.dumps(steps))
        found |= {f"{kind}_prompts": len(flat(steps)), f"{kind}_pairs": sum(map(len, flat(steps))),
                  f"{kind}_steps": len(steps), f"{kind}_saving": saving(flat(steps), tokens)}  # fmt: skip
    return found


def flat(steps: list[list[list[Row]]]) -> list[list[Row]]:
    """Return the prompts of all steps, each with its pairs."""
    return [pairs for step in steps for pairs in step]


def draw(rows: dict[str, list[Row]], step_pairs: int, prompts: int, seed: int) -> list[list[list[Row]]]:
    """Draw steps of prompts with their pairs, until there are so many prompts."""
    order = list(rows)
    random.Random(seed).shuffle(order)  # noqa: S311
    # A part is enough to fill a few steps from, and much faster than all of it.
    order = order[: 4 * prompts]
    steps: list[list[list[Row]]] = []
    for step in partition([len(rows[prompt]) for prompt in order], step_pairs):
        if sum(map(len, steps)) >= prompts:
            break
        steps.append([rows[order[place]] for place in step])
    return steps


def saving(groups: Iterable[list[Row]], tokens: dict[str, int]) -> float:
    """Return how many tokens pairs have for each token of the same pairs in groups."""
    alone = together = 0
    for pairs in groups:
        alone += sum(tokens[text] for prompt, *sides in pairs for side in sides for text in (prompt, side))
        together += sum(tokens[text] for text in {text for pair in pairs for text in pair})
    return alone / together


def product(folder: Path, count: int) -> None:
    """Write random texts whose prompts have so many pairs each, and their tokenizer."""
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(["<|end|>", "<|pad|>", "<|unk|>"])}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), TOKENIZER_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")  # noqa: S106
    fast.save_pretrained(folder / "tokenizer")
    source, words = random.Random(0), list(vocabulary)[3:]  # noqa: S311

    def text(tokens: int) -> str:
        return " ".join(source.choices(words, k=tokens))

    def prompt() -> list[Row]:
        asked, sides = text(PROMPT_TOKENS), [[text(RESPONSE_TOKENS - 1) for _ in range(n)] for n in PRODUCTS[count]]
        return [
            (asked + "\n", chosen + " <|end|>", rejected + " <|end|>") for chosen in sides[0] for rejected in sides[1]
        ]

    for kind, number in TIMED_STEPS.items():
        steps = [[prompt() for _ in range(STEP_PAIRS // count)] for _ in range(number)]
        (folder / f"steps-{kind}.json").write_text(json.dumps(steps))


def one(name: str, folder: Path, *, check: bool, times: int) -> None:
    """Tell one measurement, or the losses of a check."""
    torch.set_num_threads(THREADS)
    rung = Rung(name, folder, check=check)
    reference, guard = rung.setup_trainer() if name in TRAINERS else rung.setup_loop()
    losses = rung.first_losses()
    if check:
        tell({"losses": losses})
        return
    seconds = [rung.train() for _ in range(times)]
    tell({
        "seconds": seconds[0], "all_seconds": seconds, "reference_seconds": reference, "guard_seconds": guard,
        "tokens": rung.tokens(), "parameters": rung.model.num_parameters(),
        "floor": sum(len(group.prompt) + sum(map(len, group.responses)) for group in rung.groups),
    })  # fmt: skip


def run(name: str, folder: Path, **options: int) -> dict[str, Any]:
    """Run one measurement, or the check of a rung, in a process of its own."""
    measured = answer(start(__file__, one=name, work=folder, **options))
    print(name, measured, file=sys.stderr, flush=True)
    return measured


def check(folder: Path) -> dict[str, float]:
    """Return how far each rung's losses are from TRL's on the first prompts; fail where that is too far."""
    found = {name: run(name, folder, check=1)["losses"] for name in CHECKED}
    assert max(found["trl"]) - min(found["trl"]) > 0.1, "the losses are all the same; nothing is checked"
    worst = {}
    for name in CHECKED[1:]:
        worst[name] = max(abs(a - b) for a, b in zip(found[name], found["trl"], strict=True))
        if worst[name] > TOLERANCE:
            sys.exit(f"Rung {name} computes another loss than TRL: {worst[name]:.1e} apart on a pair.")
    return worst


def summarise(rows: dict[str, list[dict[str, Any]]], sizes: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return medians of each rung, scaled to an epoch, and its ratios."""
    found = {}
    for name, runs in rows.items():
        scale = sizes["all_pairs"] / sizes["fast_pairs" if name in FAST else "slow_pairs"]
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("seconds", "reference_seconds", "guard_seconds")
        }
        total = statistics.median(run["seconds"] + run["reference_seconds"] for run in runs)
        found[name] = {
            "epoch_seconds": total * scale + middle["guard_seconds"], "guard_seconds": middle["guard_seconds"],
            "training_seconds": middle["seconds"] * scale,
            "reference_seconds": middle["reference_seconds"] * scale, "gib": max(run["gib"] for run in runs),
            "tokens": runs[0]["tokens"] * scale, "share_of_floor": runs[0]["floor"] / runs[0]["tokens"],
        }  # fmt: skip
    for other in {"trl", "trl-tuned", "pairs"} & set(found):
        for entry in found.values():
            entry[f"against_{other}"] = found[other]["epoch_seconds"] / entry["epoch_seconds"]
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Format the table."""
    others = ("trl", "trl-tuned", "pairs")
    rows = [
        [
            name, f"{entry['epoch_seconds']:,.0f} s", f"{entry['reference_seconds']:,.0f} s",
            f"{entry['guard_seconds']:.0f} s",
            *(f"{entry[f'against_{other}']:.1f}x" if f"against_{other}" in entry else "" for other in others),
            f"{entry['gib']:.2f} GiB", f"{entry['tokens'] / 1e6:.2f} M", f"{entry['share_of_floor']:.0%}",
        ]
        for name, entry in found.items()
    ]  # fmt: skip
    head = ["rung", "an epoch", "of it reference", "of it guard", *(f"against {other}" for other in others), "peak memory",
            "tokens computed", "distinct / computed"]  # fmt: skip
    return pipes(head, rows)


def missed(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the bounds of the ladder that were missed."""
    ours = found.get("grouped", {})
    ratios = {name: (ours.get(f"against_{name}"), least) for name, least in BOUNDS.items()}
    wrong = [f"{got:.1f}x {name}, not {least:.0f}x" for name, (got, least) in ratios.items() if got and got < least]
    if ours and "trl" in found and ours["gib"] >= found["trl"]["gib"]:
        wrong.append(f"{ours['gib']:.2f} GiB, trl {found['trl']['gib']:.2f}")
    return wrong


def ladder(asked: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Measure an epoch on the released pairs; return its content, its Markdown and the bounds that were missed."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.rungs}
    sizes = prepare(folder, asked.prompts, asked.set)
    apart = check(folder)
    for _ in range(asked.repeats):
        for name in asked.rungs:
            rows[name].append(run(name, folder))
    found = summarise(rows, sizes)
    million = rows[asked.rungs[0]][0]["parameters"] / 1e6
    note = (
        f"{million:.0f} M parameters, float32, two threads. Timed on {sizes['slow_prompts']} prompts with "
        f"{sizes['slow_pairs']} pairs in steps of {STEP_PAIRS} ({', '.join(sorted(FAST))}: {sizes['fast_prompts']} with "
        f"{sizes['fast_pairs']}), scaled to the {sizes['all_pairs']:,} pairs of an epoch; medians of {asked.repeats}. "
        f"Pairs have {sizes['slow_saving']:.2f} ({sizes['fast_saving']:.2f}) tokens for one of grouped rows, in the whole "
        f"set {sizes['saving']:.2f}. Losses of the first pairs are within {max(apart.values()):.0e} of TRL's."
    )
    content = {"sizes": sizes, "losses_apart": apart, "rungs": found, "runs": rows}
    return content, f"{table(found)}\n\n{note}", missed(found)


def steps_by_pairs_per_prompt(asked: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Measure an optimiser step of TRL as it comes, TRL tuned and grouped rows, by pairs per prompt; as `ladder`."""
    names, found, rows, wrong = ("trl", "trl-tuned", "grouped"), {}, [], []
    for count in PRODUCTS:
        product(folder / str(count), count)
        entry: dict[str, Any] = {}
        for name in names:
            measured = run(name, folder / str(count), times=asked.repeats)
            number = TIMED_STEPS["fast" if name in FAST else "slow"]
            entry[name] = statistics.median(measured["all_seconds"]) / number
            entry[f"{name} GiB"], entry[f"{name} run"] = measured["gib"], measured
        entry |= {f"against {name}": entry[name] / entry["grouped"] for name in names[:-1]}
        rows.append([
            str(count), *(f"{entry[name]:.2f} s" for name in names),
            *(f"{entry[f'against {name}']:.1f}x" for name in names[:-1]),
            *(f"{entry[f'{name} GiB']:.2f} GiB" for name in names),
        ])  # fmt: skip
        if entry["against trl-tuned"] < STEP_BOUNDS.get(count, 0):
            wrong.append(f"{entry['against trl-tuned']:.1f}x trl-tuned at {count} pairs per prompt")
        found[count] = entry
    head = ["pairs per prompt", *(f"{name}, a step" for name in names), *(f"against {name}" for name in names[:-1]),
            *(f"{name}, memory" for name in names)]  # fmt: skip
    note = (
        f"Prompts of {PROMPT_TOKENS} tokens, responses of {RESPONSE_TOKENS}, {STEP_PAIRS} pairs a step, the same model; "
        f"medians of {asked.repeats} runs in a row of {TIMED_STEPS['slow']} step (grouped: {TIMED_STEPS['fast']}), without "
        "the reference pass. Memory is the peak of the whole process."
    )
    return {"pairs_per_prompt": found}, f"{pipes(head, rows)}\n\n{note}", wrong


#: Table -> its files, and what measures it.
TABLES = {"ladder": ("train-cpu", ladder), "steps": ("train-steps", steps_by_pairs_per_prompt)}


def main() -> None:
    """Measure the tables that were asked for, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="least prompts of the subset")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=RUNGS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `persodpo --set`")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=RUNGS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.work, check=bool(asked.check), times=asked.times)
        return
    wrong: list[str] = []
    for file, measure in (TABLES[name] for name in asked.tables):
        with tempfile.TemporaryDirectory() as place:
            content, text, missed_here = measure(asked, Path(place))
        save(file, {"machine": machine(threads=THREADS, repeats=asked.repeats), **content}, text, asked.output)
        wrong += missed_here
    if wrong:
        sys.exit(f"Bounds missed by grouped: {'; '.join(wrong)}.")


if __name__ == "__main__":
    main()
