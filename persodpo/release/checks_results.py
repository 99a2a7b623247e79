"""Checks of the audit on results, figures and training logs: each recomputes one claim of ``findings.yaml``."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd

from persodpo.completions import read_completion
from persodpo.release import published
from persodpo.release.checks import PARTLY, Evidence, Material, evidence
from persodpo.release.parity import FIGURE_2A, RESULT_ROWS, STEP_PAIRS, parity_table, set_statistics
from persodpo.runfolder import sha256

#: Reward accuracy from which there is next to nothing left to learn.
SATURATED = 0.98
#: Precision with which the plotted curves were read, by column (see `published.training_curves`).
CURVE_PRECISION = {"loss": 2e-5, "grad_norm": 5e-3, "reward_margin": 1e-4}


def weights_inert(material: Material) -> Evidence:
    """A2: a run called weighted and one called plain have the same curves."""
    curves = published.training_curves().set_index(["run", "step"])
    plain, weighted = (curves.loc[f"UltraFeedback/Qwen2-0.5B-DPO{suffix}"] for suffix in ("", "-Weighted"))
    apart = {column: float((plain[column] - weighted[column]).abs().max()) for column in CURVE_PRECISION}
    shown = ", ".join(f"{column} {value:.1g}" for column, value in apart.items())
    text = (
        f"Published curves of an UltraFeedback run named DPO-Weighted and of one named DPO, {len(plain)} points: largest "
        f"differences {shown}, within the precision they can be read with. {_trl_columns()} The override itself stands in "
        "a notebook, which is no data file."
    )
    same = all(apart[column] <= 2 * precision for column, precision in CURVE_PRECISION.items())
    return evidence(same, text, PARTLY)


def _trl_columns() -> str:
    """Say which columns TRL's DPO trainer drops, read from its source without importing it."""
    trl = distribution("trl")
    source = Path(str(trl.locate_file("trl/trainer/dpo_trainer.py"))).read_text(encoding="utf-8")
    kept = " ".join(re.findall(r"self\._signature_columns = \[([^]]*)\]", source))
    lost = [column for column in ("score_chosen", "score_rejected") if f'"{column}"' not in kept]
    return f"TRL {trl.version} drops the columns {' and '.join(lost)} before the loss."


def unequal_sizes(material: Material) -> Evidence:
    """A6: the two bars of Figure 2a are models of different size."""
    parts, sizes = [], []
    for label in (*FIGURE_2A.values(), "Qwen2-5B-benchmark"):
        which, statistics = material.sets[label][0], set_statistics(material.files, label)
        parts.append(f"{which.model} {statistics['response_time'][0]:.2f} s, {statistics['Failure Ratio'][0]:.3f}")
        sizes.append(which.model.split("-")[1])
    text = f"Response time and failure ratio: {'; '.join(parts)} (untuned, same size)."
    return evidence(sizes[0] != sizes[1], text)


def perso_run(material: Material) -> Evidence:
    """A7: the run named perso has four failure ratios, none of them Figure 2a's."""
    outcomes = material.rows("Qwen2-5B-Instruct-perso (raw file)")["completion"].map(
        lambda text: read_completion(text).outcome
    )
    bar = FIGURE_2A["PersoDPO (Qwen2-0.5B, length_prior run)"]
    raw, loops = (outcomes != "ok").mean(), (outcomes == "loop").mean()
    metrics, drawn = (material.rows(label)["parsed"].isna().mean() for label in ("Qwen2-5B-Instruct-perso", bar))
    table = published.results_table().set_index("Model")["Failure Ratio"]
    printed = [str(table[f"Qwen2-5B-Instruct-perso{row}"]).split(" ")[0] for row in ("", " check-2304")]
    text = (
        f"The run named perso fails {raw:.3f} in its raw file, {metrics:.3f} in its metric file, {printed[0]} and "
        f"{printed[1]} in the results table; {loops:.1%} of its raw completions are loops. Figure 2a's bar fails "
        f"{drawn:.3f}."
    )
    return evidence(bool(raw > metrics > float(printed[0])), text)


def results_table(material: Material) -> Evidence:
    """A8: which rows of the results table follow from the files."""
    parity = parity_table(material.files, material.tables)
    cells = parity[parity["group"] == "results table"]
    verdicts = cells.groupby(cells["quantity"].str.rsplit(":", n=1).str[0])["verdict"].agg(set)
    whole = [row for row in RESULT_ROWS if verdicts[row] == {"reproduced"}]
    missing = [row for row, origin in RESULT_ROWS.items() if origin is None]
    rest = [row for row in RESULT_ROWS if row not in whole and row not in missing]
    text = (
        f"All six cells reproduced: {', '.join(whole)}. From other numbers than the published file of their name: "
        f"{', '.join(rest)}. No published file: {', '.join(missing)}."
    )
    return evidence(bool(whole and (rest or missing)), text)


def simple_log(material: Material) -> Evidence:
    """A13: the simple log is of fewer pairs than the pair set has."""
    log, pairs = published.counts()["training"]["simple"], len(material.tables["pairs/simple"])
    steps = -(-pairs // STEP_PAIRS) * log["epochs"]
    curves = published.training_curves()
    longer = curves.loc[curves["run"] == "Qwen2-5B-Instruct-FoCus-simple", "step"].max()
    text = (
        f"The log has {log['pairs']:,} pairs and {log['optimizer_steps']:,} steps; the {pairs:,} pairs of the files would "
        f"take {steps:,}. Its losses are those of the plotted run FoCus-simple-DPO; the plotted run FoCus-simple "
        f"goes to step {longer:,}, which would fit {pairs:,} pairs at 8 a step ({-(-pairs // 8) * 3:,} steps)."
    )
    return evidence(log["pairs"] != pairs and log["optimizer_steps"] != steps, text)


def baseline_split(material: Material) -> Evidence:
    """A14: the untuned row is of train prompts."""
    rows = [len(material.rows(f"Qwen2-5B-Instruct-{name}")) for name in ("train", "length_prior")]
    train, valid = (
        set_statistics(material.files, label)["Failure Ratio"][0]
        for label in ("Qwen2-5B-Instruct-train", "Qwen2-5B-benchmark")
    )
    text = (
        f"The row Qwen2-5B-Instruct-train has {rows[0]:,} train responses, tuned rows {rows[1]:,} valid ones. On valid "
        f"prompts the untuned model fails {valid:.3f} instead of {train:.3f}."
    )
    return evidence(rows[0] != rows[1], text)


def saturation(material: Material) -> Evidence:
    """A15: the margin grows on after accuracy is all but 1."""
    curves = published.training_curves()
    run = curves[curves["run"] == "Qwen2-5B-Instruct-FoCus-perso-DPO"].set_index("step")
    third = run[run.index > 2 * published.counts()["training"]["perso"]["optimizer_steps"] // 3]
    sated = run[run["reward_accuracy"] > SATURATED]
    first, last = sated.iloc[0], run.iloc[-1]
    text = (
        f"Figure 2b's run: accuracy passes {SATURATED} at step {sated.index[0]} of {run.index[-1]:,}, with a reward margin "
        f"of {first['reward_margin']:.1f}; by the end the margin is {last['reward_margin']:.1f}. In epoch 3 accuracy is "
        f"{third['reward_accuracy'].max():.4f}, the loss {third['loss'].min():.5f} and the margin flat "
        f"({third['reward_margin'].min():.1f} to {third['reward_margin'].max():.1f})."
    )
    return evidence(bool(last["reward_margin"] > 1.5 * first["reward_margin"] and sated.index[0] < 300), text)


def raw_copy(material: Material) -> Evidence:
    """A16: a raw file is a copy of the parsed one."""
    raw, parsed = (
        sha256(material.files[f"{folder}/FoCus/Qwen2-5B-Instruct.csv"]) for folder in ("Raw Responses", "Responses")
    )
    failures = int(material.rows("Qwen2-5B-benchmark")["parsed"].isna().sum())
    text = (
        f"Both files have sha256 {raw[:12]}...; why {failures} responses of the untuned Qwen2-0.5B failed on valid prompts "
        "cannot be told."
    )
    return evidence(raw == parsed, text)


def mixed_runs(material: Material) -> Evidence:
    """A17: files of one name are of different runs."""
    raw, scored, base = (
        material.rows(f"Qwen2-5B-{name}")["response_time"]
        for name in ("Instruct-perso (raw file)", "Instruct-perso", "benchmark")
    )
    agree = np.isclose(raw, scored).mean()
    times = pd.read_csv(material.files["Responses/FoCus/Qwen2-5B-Instruct.csv"])["response_time"]
    text = (
        f"perso: {agree:.1%} of response times agree between raw and metric file. Untuned Qwen2-0.5B on valid prompts: "
        f"{np.isclose(times, base).mean():.1%} agree between response file ({times.mean():.3f} s) and metric file "
        f"({base.mean():.3f} s)."
    )
    return evidence(bool(agree < 0.5), text)


def plotted_log(material: Material) -> Evidence:
    """A23: the plotted perso run is not the saved one."""
    curves, losses = published.training_curves(), published.training_losses()
    parts, apart = [], {}
    for run in ("simple", "perso"):
        plotted = curves[curves["run"] == f"Qwen2-5B-Instruct-FoCus-{run}-DPO"].set_index("step")["loss"]
        gap = (plotted - losses[losses["run"] == run].set_index("step")["loss"]).abs().dropna()
        apart[run] = float(gap.max())
        parts.append(f"{run}: largest difference {gap.max():.4f} over {len(gap)} points")
    text = f"Loss of the saved log against the plotted curve. {'; '.join(parts)}. The log keeps four decimals."
    return evidence(apart["simple"] < 1e-4 < apart["perso"], text)
