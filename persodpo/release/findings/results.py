"""Findings about the results table, the figures and the training logs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd

from persodpo.completions import read_completion
from persodpo.release import published
from persodpo.release.findings.base import CONFIRMED, PARTLY, REFUTED, Evidence, Finding, Material, evidence
from persodpo.release.parity import FIGURE_2A, RESULT_ROWS, STEP_PAIRS, parity_table, set_statistics
from persodpo.runfolder import sha256

#: Reward accuracy from which there is next to nothing left to learn.
SATURATED = 0.98
#: Precision with which the plotted curves were read, by column (see `published.training_curves`).
CURVE_PRECISION = {"loss": 2e-5, "grad_norm": 5e-3, "reward_margin": 1e-4}


def check_weights_inert(material: Material) -> Evidence:
    """A2: a run called weighted and one called plain have the same curves."""
    curves = published.training_curves().set_index(["run", "step"])
    plain, weighted = (curves.loc[f"UltraFeedback/Qwen2-0.5B-DPO{suffix}"] for suffix in ("", "-Weighted"))
    apart = {column: float((plain[column] - weighted[column]).abs().max()) for column in CURVE_PRECISION}
    same = all(apart[column] <= 2 * precision for column, precision in CURVE_PRECISION.items())
    shown = ", ".join(f"{column} {value:.1g}" for column, value in apart.items())
    text = (
        f"Published curves of an UltraFeedback run named DPO-Weighted and of one named DPO, {len(plain)} points: largest "
        f"differences {shown}, within the precision they can be read with. {_trl_columns()}"
    )
    return Evidence(
        PARTLY if same else REFUTED, f"{text} The override itself stands in a notebook, which is no data file."
    )


def _trl_columns() -> str:
    """Say which columns TRL's DPO trainer keeps, read from its source without importing it."""
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        return "TRL is not installed, so its columns were not read."
    source = Path(package.origin).parent / "trainer" / "dpo_trainer.py"
    kept = {
        element.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self._signature_columns"
        and isinstance(node.value, ast.List)
        for element in node.value.elts
        if isinstance(element, ast.Constant)
    }  # fmt: skip
    lost = [column for column in ("score_chosen", "score_rejected") if column not in kept]
    return f"TRL {importlib.metadata.version('trl')} drops the columns {' and '.join(lost)} before the loss."


def check_unequal_sizes(material: Material) -> Evidence:
    """A6: the two bars of Figure 2a are models of different size."""
    labels = [*FIGURE_2A.values(), "Qwen2-5B-benchmark"]
    parts = []
    for label in labels:
        which = material.sets[label][0]
        statistics = set_statistics(material.files, which)
        parts.append(f"{which.model} {statistics['response_time'][0]:.2f} s, {statistics['Failure Ratio'][0]:.3f}")
    sizes = {material.sets[label][0].model.split("-")[1] for label in FIGURE_2A.values()}
    return evidence(len(sizes) > 1, f"Response time and failure ratio: {'; '.join(parts)} (untuned, same size).")


def check_perso_run(material: Material) -> Evidence:
    """A7: the run named perso has four failure ratios, none of them Figure 2a's."""
    raw = material.sets["Qwen2-5B-Instruct-perso (raw file)"][1]["completion"]
    metrics = material.sets["Qwen2-5B-Instruct-perso"][1]["parsed"].isna().mean()
    outcomes = raw.map(lambda text: read_completion(text).outcome)
    failed = (outcomes != "ok").mean()
    table = published.results_table().set_index("Model")["Failure Ratio"]
    printed = [
        str(table[row]).split(" ")[0] for row in ("Qwen2-5B-Instruct-perso", "Qwen2-5B-Instruct-perso check-2304")
    ]
    loops = (outcomes == "loop").mean()
    bar = material.sets[FIGURE_2A["PersoDPO (Qwen2-0.5B, length_prior run)"]][1]["parsed"].isna().mean()
    text = (
        f"The run named perso fails {failed:.3f} in its raw file, {metrics:.3f} in its metric file, {printed[0]} and "
        f"{printed[1]} in the results table; {loops:.1%} of its raw completions are loops. Figure 2a's bar fails {bar:.3f}."
    )
    return evidence(bool(failed > metrics > float(printed[0])), text)


def check_results_table(material: Material) -> Evidence:
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


def check_simple_log(material: Material) -> Evidence:
    """A13: the simple log is of fewer pairs than the pair set has."""
    log = published.counts()["training"]["simple"]
    pairs = len(material.tables["pairs/simple"])
    steps = -(-pairs // STEP_PAIRS) * log["epochs"]
    curves = published.training_curves()
    longer = curves.loc[curves["run"] == "Qwen2-5B-Instruct-FoCus-simple", "step"].max()
    text = (
        f"The log has {log['pairs']:,} pairs and {log['optimizer_steps']:,} steps; the {pairs:,} pairs of the files would "
        f"take {steps:,}. Its losses are those of the plotted run FoCus-simple-DPO; the plotted run FoCus-simple "
        f"goes to step {longer:,}, which would fit {pairs:,} pairs at 8 a step ({-(-pairs // 8) * 3:,} steps)."
    )
    return evidence(log["pairs"] != pairs and log["optimizer_steps"] != steps, text)


def check_baseline_split(material: Material) -> Evidence:
    """A14: the untuned row is of train prompts."""
    rows = {
        label: len(material.sets[label][1]) for label in ("Qwen2-5B-Instruct-train", "Qwen2-5B-Instruct-length_prior")
    }
    train = set_statistics(material.files, material.sets["Qwen2-5B-Instruct-train"][0])
    valid = set_statistics(material.files, material.sets["Qwen2-5B-benchmark"][0])
    text = (
        f"The row Qwen2-5B-Instruct-train has {rows['Qwen2-5B-Instruct-train']:,} train responses, tuned rows "
        f"{rows['Qwen2-5B-Instruct-length_prior']:,} valid ones. On valid prompts the untuned model fails "
        f"{valid['Failure Ratio'][0]:.3f} instead of {train['Failure Ratio'][0]:.3f}."
    )
    return evidence(len(set(rows.values())) > 1, text)


def check_saturation(material: Material) -> Evidence:
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


def check_raw_copy(material: Material) -> Evidence:
    """A16: a raw file is a copy of the parsed one."""
    raw, parsed = (material.files[f"{folder}/FoCus/Qwen2-5B-Instruct.csv"] for folder in ("Raw Responses", "Responses"))
    failures = int(material.sets["Qwen2-5B-benchmark"][1]["parsed"].isna().sum())
    text = (
        f"Both files have sha256 {sha256(raw)[:12]}...; why {failures} responses of the untuned Qwen2-0.5B failed on valid "
        "prompts cannot be told."
    )
    return evidence(sha256(raw) == sha256(parsed), text)


def check_mixed_runs(material: Material) -> Evidence:
    """A17: files of one name are of different runs."""
    raw, scored = (
        material.sets[f"Qwen2-5B-Instruct-perso{suffix}"][1]["response_time"] for suffix in (" (raw file)", "")
    )
    agree = np.isclose(raw, scored).mean()
    times = pd.read_csv(material.files["Responses/FoCus/Qwen2-5B-Instruct.csv"])["response_time"]
    base = material.sets["Qwen2-5B-benchmark"][1]["response_time"]
    text = (
        f"perso: {agree:.1%} of response times agree between raw and metric file. Untuned Qwen2-0.5B on valid prompts: "
        f"{np.isclose(times, base).mean():.1%} agree between response file ({times.mean():.3f} s) and metric file "
        f"({base.mean():.3f} s)."
    )
    return evidence(bool(agree < 0.5), text)


def check_plotted_log(material: Material) -> Evidence:
    """A23: the plotted perso run is not the saved one."""
    curves, losses = published.training_curves(), published.training_losses()
    parts, apart = [], {}
    for run in ("simple", "perso"):
        plotted = curves[curves["run"] == f"Qwen2-5B-Instruct-FoCus-{run}-DPO"].set_index("step")["loss"]
        logged = losses[losses["run"] == run].set_index("step")["loss"]
        gap = (plotted - logged).abs().dropna()
        apart[run] = float(gap.max())
        parts.append(f"{run}: largest difference {gap.max():.4f} over {len(gap)} points")
    text = f"Loss of the saved log against the plotted curve. {'; '.join(parts)}. The log keeps four decimals."
    return Evidence(CONFIRMED, text) if apart["simple"] < 1e-4 < apart["perso"] else evidence(False, text)


FINDINGS = [
    Finding(
        "A2",
        "Score weighting never ran: the override has a name that TRL did not call before 0.29, and TRL drops the score "
        "columns before the loss.",
        "Both published FoCus runs optimised plain DPO; the paper's weighted loss was never measured.",
        check_weights_inert,
        mend="a trainer in which the weights provably reach the loss",
    ),
    Finding(
        "A6",
        "Figure 2a compares different sizes: its benchmark bar is Qwen2-7B, its PersoDPO bar Qwen2-0.5B.",
        "Most of the gain in response time, and some in failures, is the smaller model.",
        check_unequal_sizes,
        mend="Figure 2a is drawn with the untuned Qwen2-0.5B beside it",
    ),
    Finding(
        "A7",
        "Figure 2a's bar is of the length_prior run; the run named perso fails far more, by a different ratio in each file.",
        "The method named in the paper is not the one whose gain is shown.",
        check_perso_run,
        mend="results are derived from one run folder, whose hashes tie every file together",
    ),
    Finding(
        "A8",
        "Some of the nine rows of the results table follow exactly from the metric files; the others follow from nothing "
        "that was released.",
        "Two thirds of the table cannot be checked.",
        check_results_table,
        mend="a result that cannot be derived does not render",
    ),
    Finding(
        "A13",
        "The simple training log is of 9,024 pairs; the released files give 12,452.",
        "The saved simple run was trained on another pair set.",
        check_simple_log,
        mend="a pair set's hash stands in the provenance of what is trained on it",
    ),
    Finding(
        "A14",
        "The baseline row Qwen2-5B-Instruct-train is measured on train prompts, the tuned rows on valid prompts.",
        "Before and after are different prompts.",
        check_baseline_split,
        mend="the results table takes held-out responses only",
    ),
    Finding(
        "A15",
        "Training saturates: nearly every pair is won within a third of the first epoch, and the margin doubles after that.",
        "Most of the training moves the policy away from the reference with next to nothing left to learn.",
        check_saturation,
        mend="fewer epochs, chosen by a held-out set",
    ),
    Finding(
        "A16",
        "The raw responses of the untuned Qwen2-0.5B on valid prompts are a copy of its parsed ones.",
        "Its failures, the baseline of every comparison, cannot be examined.",
        check_raw_copy,
        mend="completions are kept as generated",
    ),
    Finding(
        "A17",
        "Files of one name hold different runs: the raw and the metric file of perso, the response and the metric file of "
        "the untuned Qwen2-0.5B.",
        "Numbers of the two cannot be joined.",
        check_mixed_runs,
        mend="tables join on dialogue and model, and carry the hash of what they came from",
    ),
    Finding(
        "A23",
        "The perso curve of Figure 2b is not that of the saved perso run; the simple one is.",
        "The figure and the released log are of two trainings.",
        check_plotted_log,
        mend="a figure carries the hashes of the tables it was drawn from",
    ),
]
