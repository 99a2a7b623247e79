"""Rows of `gpu.py` in, figures and tables out."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch
from gpu_wheels import PROJECT, unmet

Rows = dict[str, dict[str, Any]]
#: Least factor of the best `grouped` against TRL as it comes and against the best `tuned`.
GOALS = {"trl": 10.0, "tuned": 6.0}
#: Dense bf16 operations per second, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "pydantic", "numpy")
EPOCH_PAIRS = 9184


def summary(rows: Rows, device: str) -> Rows:
    """Return figures of the rungs that ran: rates, utilisation, an epoch, and ratios to TRL."""
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    found: Rows = {}
    for name, row in rows.items():
        if row.get("seconds"):
            step = statistics.median(row["seconds"])
            whole = step + row["reference_seconds"]
            found[name] = {
                "pairs_per_second": row["pairs"] / whole, "pairwise_tokens_per_second": row["pairwise_tokens"] / whole,
                "positions_per_second": row["computed"] / step, "epoch_seconds": whole / row["pairs"] * EPOCH_PAIRS,
                "reference_share": row["reference_seconds"] / whole, "spread": max(row["seconds"]) / min(row["seconds"]),
                "utilisation": row["operations"] / step / peak if peak else None,
            }  # fmt: skip
    for other in GOALS:
        epochs = [entry["epoch_seconds"] for name, entry in found.items() if name.startswith(other)]
        for entry in found.values():
            entry[f"against_{other}"] = min(epochs) / entry["epoch_seconds"] if epochs else None
    return found


def verdict(figures: Rows) -> str:
    """Say whether the goals were met by the fastest grouped rung."""
    ours = [entry for name, entry in figures.items() if name.startswith("grouped")]
    best = max(ours, key=lambda entry: entry["pairs_per_second"], default={})
    said = []
    for other, least in GOALS.items():
        got = best.get(f"against_{other}")
        state = "not measured" if got is None else f"{got:.1f}x, {'met' if got >= least else 'MISSED'}"
        said.append(f"{least:.0f}x {other}: {state}")
    return f"Goals of the fastest grouped rung: {'; '.join(said)}."


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def packing_table(content: dict[str, Any]) -> str:
    """Format the first part."""
    rows = []
    for key, row in content["packing"].items():
        cells = [row.get("error") or row.get("refused") or "", "", "", ""]
        if "apart" in row:
            layout = "grouped" if row["grouped"] else "one response per row"
            cells = [layout + ", own head" * row["own_head"], f"{row['difference']:.1e} of {row['tolerance']:.0e}",
                     f"{row['apart']:.1e}", row["reason"]]  # fmt: skip
        cells.insert(3, f"{row['rounding']:.1e}" if "rounding" in row else "")
        rows.append([*key.split(" | "), *cells])
    head = ["architecture", "weights", "attention", "verdict", "guard, nats per token", "packed - plain, nats per response",
            "plain in this type - in float32", "reason"]  # fmt: skip
    return table(head, rows)


def ladder_table(content: dict[str, Any]) -> str:
    """Format the second part."""
    rows = []
    for name, row in content["ladder"].items():
        entry = content["figures"].get(name)
        if entry is None:
            rows.append([name, row.get("error", "no step timed"), *[""] * 10])
            continue
        share = "" if entry["utilisation"] is None else f"{entry['utilisation']:.1%}"
        rows.append([
            name, f"{row['repeats']}, within {entry['spread'] - 1:.0%}", f"{entry['pairs_per_second']:,.1f}",
            f"{entry['pairwise_tokens_per_second']:,.0f}", f"{entry['positions_per_second']:,.0f}",
            f"{row['positions'] / row['computed']:.0%}", share, f"{row['gib']:.1f} GiB", f"{entry['reference_share']:.0%}",
            f"{entry['epoch_seconds']:,.1f} s",
            *("" if entry[f"against_{other}"] is None else f"{entry[f'against_{other}']:.1f}x" for other in GOALS),
        ])  # fmt: skip
    head = ["rung", "repeats", "pairs/s", "tokens/s as if pairwise", "positions/s", "no padding", "MFU", "peak memory",
            "of it reference", f"{EPOCH_PAIRS:,} pairs", "against trl", "against best tuned"]  # fmt: skip
    return f"{table(head, rows)}\n\n{verdict(content['figures'])}"


def training_table(content: dict[str, Any]) -> str:
    """Format the third part."""
    rows = []
    for key, row in content["training"].items():
        cells = [row.get("error", ""), "", "", ""]
        if "apart" in row:
            lists = (", ".join(f"{loss:.5f}" for loss in row[name]) for name in ("tuned", "grouped"))
            cells = [*lists, f"{row['apart']:.1e}", f"{row['tuned_gib']:.1f} / {row['grouped_gib']:.1f} GiB"]
        rows.append([*key.split(" | "), *cells])
    return table(["training", "precision", "losses of TRL", "losses of grouped", "apart", "peak memory"], rows)


def report(content: dict[str, Any]) -> str:
    """Format everything."""
    machine = content["machine"]
    parts = [packing_table(content), ladder_table(content), training_table(content)]
    parts.append(", ".join(f"{name} {value}" for name, value in machine.items() if value and name != "unmet") + ".")
    parts += [f"Requirements that are not met: {'; '.join(machine['unmet'])}."] if machine["unmet"] else []
    return "\n\n".join(parts) + "\n"


def described(device: str) -> dict[str, Any]:
    """Describe the machine."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    found["python"] = sys.version.split()[0]
    for name in (*PACKAGES, "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with suppress(OSError):
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found | {"unmet": unmet(PACKAGES)}
