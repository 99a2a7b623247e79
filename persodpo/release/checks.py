"""Checks of the audit: each recomputes one claim of ``findings.yaml`` from the published files and the run's tables.

A check is called by the name that its entry gives it. It returns whether the claim holds, and the numbers that fill the
entry's ``evidence``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persodpo.completions import count_words, is_echo, is_one_object, read_completion
from persodpo.config import Profile
from persodpo.dialogues import overlaps
from persodpo.files import sha256
from persodpo.method import SIGNALS
from persodpo.prompts import FIELDS
from persodpo.release import published
from persodpo.release.parity import FIGURE_2A, RESULT_ROWS, STEP_PAIRS, parity_table, set_statistics
from persodpo.release.published import SETS, read_set

#: Equal up to the noise of batched float32 inference.
COHERENCE_TOLERANCE = 1e-5
#: Reward accuracy from which there is next to nothing left to learn.
SATURATED = 0.98
#: Precision with which the plotted curves were read, by column (see `published.training_curves`).
CURVE_PRECISION = {"loss": 2e-5, "grad_norm": 5e-3, "reward_margin": 1e-4}

Evidence = tuple[bool, dict[str, Any]]


@dataclass(frozen=True)
class Material:
    """What the checks look at: published files by manifest path, and the run's tables by name, made ``as_released``."""

    files: dict[str, Path]
    tables: dict[str, pd.DataFrame]
    low: float  # thresholds of quality
    high: float
    profile: Profile

    @cached_property
    def sets(self) -> dict[str, pd.DataFrame]:
        """Every published set by its label, as published."""
        return {which.label: read_set(self.files, which) for which in SETS}

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Ranked train responses with their scores."""
        return self.tables["responses"].merge(self.tables["scores"], on=["dialogue_id", "model"], validate="one_to_one")

    @cached_property
    def gates(self) -> dict[str, dict[str, float]]:
        """The gate's checks of each pair set."""
        sets = self.tables["pairs/gate"].groupby("pair_set")
        return {str(name): dict(zip(rows["check"], rows["value"], strict=True)) for name, rows in sets}


def _listed(values: pd.Series) -> str:
    """Write how often each value stands, the commonest first."""
    return ", ".join(f"{value} {count:,}" for value, count in values.value_counts().items())


# --- completions, scores and pairs ---


def scored_response(rows: int) -> np.ndarray:
    """Return which response the score of each valid row belongs to, [rows]: k // 8 + k % 8.

    The released loop advances its start by 1 while it takes slices of 8, and keeps the results in a row.
    """
    k = np.arange(rows)
    return np.asarray(k // 8 + k % 8)


def coherence(material: Material) -> Evidence:
    """A1: rows that the formula sends to one response have one value."""
    valid = {label: frame.loc[frame["parsed"].notna(), "coherence"] for label, frame in material.sets.items()}
    spreads = {
        label: rows.groupby(scored_response(len(rows))).agg(np.ptp) for label, rows in valid.items() if len(rows)
    }
    every, one = pd.concat(spreads), "gpt-4-turbo-train"
    broken = int((every > COHERENCE_TOLERANCE).sum())
    return not broken, {
        "files": len(spreads), "groups": len(every), "broken": broken, "tolerance": COHERENCE_TOLERANCE,
        "widest": every.max(), "rows": len(valid[one]), "scored": len(spreads[one]),
    }  # fmt: skip


def format_bonus(material: Material) -> Evidence:
    """A3: no response gets the bonus."""
    compliance = material.tables["scores"]["compliance"].dropna()
    above = int((compliance > 1.0).sum())
    return above == 0, {"largest": compliance.max(), "above": above, "responses": len(compliance)}


def failures_rejected(material: Material) -> Evidence:
    """A4: every failure is rejected, and written as valid JSON."""
    scored, pairs = material.pool[material.pool["quality"].notna()], material.tables["pairs/perso"]
    failed, low = scored["outcome"] != "ok", scored["quality"] <= material.low
    valid = {side: pairs[side].map(is_one_object).mean() for side in ("chosen", "rejected")}
    imputed = scored.set_index(["dialogue_id", "model"])["imputed"]
    both = int((failed & low).sum())
    return bool((low | ~failed).all() and min(valid.values()) == 1.0), valid | {
        "both": both, "failed": int(failed.sum()), "share": both / low.sum(), "low": int(low.sum()), "pairs": len(pairs),
        "imputed": imputed.reindex(list(zip(pairs["dialogue_id"], pairs["rejected_model"], strict=True))).mean(),
    }  # fmt: skip


def truncation(material: Material) -> Evidence:
    """A5: failures are answers that were cut off."""
    failed = material.pool[material.pool["outcome"] != "ok"]
    cut = failed["outcome"] == "truncated"
    by_model = {str(model): part for model, part in cut.groupby(failed["model"])}
    parts = [f"{model} {part.sum()}/{len(part)}" for model, part in by_model.items() if not model.startswith("gpt")]
    return bool(cut.mean() > 0.9), {"cut": cut.sum(), "failed": len(failed), "open_models": ", ".join(parts)}


def placeholder(material: Material) -> Evidence:
    """A9: completions of API models repeat the unfilled field of the prompt they were sent."""
    models = material.pool.loc[material.pool["completion"].str.contains("{max_word_count}", regex=False), "model"]
    holds = bool(len(models) and models.str.startswith("gpt").all())
    return holds, {"completions": len(models), "models": _listed(models), "fields": ", ".join(sorted(FIELDS))}


def joined_personas(material: Material) -> Evidence:
    """A10: persona sentences stand without a space between them."""
    prompts = [pd.read_csv(material.files[published.prompts_file(split)]) for split in ("train", "valid")]
    theirs = pd.concat(prompts)["personas"].reset_index(drop=True)
    ours = material.tables["dialogues"]["personas"].reset_index(drop=True)
    same, spaced = ((ours.map(joint.join) == theirs).mean() for joint in ("", " "))
    return bool(same == 1.0), {"same": same, "texts": len(theirs), "spaced": spaced}


def echo(material: Material) -> Evidence:
    """A11: parsed responses that only repeat the template."""
    echoes = material.pool[material.pool["response"].map(lambda text: bool(text) and is_echo(text))]
    return len(echoes) > 0, {
        "echoes": len(echoes), "models": _listed(echoes["model"]), "parsed": (echoes["outcome"] == "ok").sum(),
        "chosen": (echoes["quality"] >= material.high).sum(),
    }  # fmt: skip


def split_overlap(material: Material) -> Evidence:
    """A12: train and valid share dialogues."""
    dialogues, pairs = material.tables["dialogues"], material.tables["pairs/perso"]
    train, valid = (dialogues[dialogues["split"] == split] for split in ("train", "valid"))
    contexts = len(set(train["context"]) & set(valid["context"]))
    personas = len(set(train["personas"].map(tuple)) & set(valid["personas"].map(tuple)))
    leaked = train.loc[overlaps(train, valid), "dialogue_id"]
    return contexts + personas > 0, {
        "contexts": contexts, "personas": personas, "dialogues": len(leaked), "all": len(pairs),
        "pairs": int(pairs["dialogue_id"].isin(leaked).sum()),
    }  # fmt: skip


def lenient_parse(material: Material) -> Evidence:
    """A18: many accepted completions do not end with their object."""
    parsed = material.pool[material.pool["outcome"] == "ok"]
    strict = parsed["completion"].map(lambda text: read_completion(text, "strict").outcome)
    rejected = strict != "ok"
    whole = int((~parsed["completion"].map(lambda text: is_one_object(text) and text.lstrip().startswith("{"))).sum())
    return bool(rejected.mean() > 0.1), {
        "rejected": rejected.sum(), "parsed": len(parsed), "outcomes": _listed(strict[rejected]), "whole": whole,
        "models": ", ".join(_listed(parsed.loc[rejected, "model"]).split(", ")[:3]),
    }  # fmt: skip


def length_target(material: Material) -> Evidence:
    """A19: compliance rewards the mean length, not the stated limit."""
    words = material.pool.loc[material.pool["response"].notna(), "response"].map(count_words)
    limit, longest = material.profile.prompts.max_words, words.nlargest(1).index[0]
    closeness = material.pool.groupby(material.pool["model"].str.startswith("gpt"))["compliance"].mean()
    return bool(words.max() <= limit), {
        "limit": limit, "words": words.max(), "longest": material.pool["compliance"][longest],
        "api": closeness[True], "open": closeness[False],
    }  # fmt: skip


def dropped_failures(material: Material) -> Evidence:
    """A20: the worst failures never become rejected."""
    models = material.pool.loc[(material.pool["outcome"] != "ok") & material.pool["response"].isna(), "model"]
    holds = bool((models == "Qwen2-0.5B-Instruct").mean() > 0.5)
    return holds, {"completions": len(models), "models": _listed(models)}


def shortcuts(material: Material) -> Evidence:
    """A21: one feature alone predicts the label."""
    perso = material.gates["perso"]
    return perso["length_alone"] > 0.75 and perso["source_model_alone"] > 0.7, material.gates


def repeated_texts(material: Material) -> Evidence:
    """A22: the count of distinct sequences is by model."""
    perso = material.gates["perso"]
    return perso["responses"] > perso["distinct_texts"], material.gates


def imputed_agreement(material: Material) -> Evidence:
    """A24: the signals agree only about who failed."""
    scores = material.tables["scores"].dropna(subset=["quality"])
    parsed = scores[~scores["imputed"]]
    strongest = [
        float(np.abs(np.triu(rows[list(SIGNALS)].corr(method="spearman").to_numpy(), 1)).max())
        for rows in (parsed, scores)
    ]
    return strongest[1] > 2 * strongest[0], {
        "alone": strongest[0], "measured": len(parsed), "together": strongest[1],
        "failures": len(scores) - len(parsed),
    }  # fmt: skip


# --- results, figures and training logs ---


def weights_inert(_: Material) -> Evidence:
    """A2: a run called weighted and one called plain have the same curves, and TRL's source drops the columns."""
    curves = published.training_curves().set_index(["run", "step"])
    plain, weighted = (curves.loc[f"UltraFeedback/Qwen2-0.5B-DPO{suffix}"] for suffix in ("", "-Weighted"))
    apart = {column: float((plain[column] - weighted[column]).abs().max()) for column in CURVE_PRECISION}
    trl = distribution("trl")
    source = Path(str(trl.locate_file("trl/trainer/dpo_trainer.py"))).read_text(encoding="utf-8")
    columns_kept = " ".join(re.findall(r"self\._signature_columns = \[([^]]*)\]", source))
    columns_lost = [column for column in ("score_chosen", "score_rejected") if f'"{column}"' not in columns_kept]
    same = all(apart[column] <= 2 * precision for column, precision in CURVE_PRECISION.items())
    differences = ", ".join(f"{column} {value:.1g}" for column, value in apart.items())
    return same, {
        "points": len(plain),
        "differences": differences,
        "trl": trl.version,
        "lost": " and ".join(columns_lost),
    }


def unequal_sizes(material: Material) -> Evidence:
    """A6: the two bars of Figure 2a are models of different size."""
    models, parts = {which.label: which.model for which in SETS}, []
    for label in (*FIGURE_2A.values(), "Qwen2-5B-benchmark"):
        statistics = set_statistics(material.files, label)
        parts.append(f"{models[label]} {statistics['response_time'][0]:.2f} s, {statistics['Failure Ratio'][0]:.3f}")
    sizes = {models[label].split("-")[1] for label in FIGURE_2A.values()}
    return len(sizes) > 1, {"bars": "; ".join(parts)}


def perso_run(material: Material) -> Evidence:
    """A7: the run named perso has four failure ratios, none of them Figure 2a's."""
    completions = material.sets["Qwen2-5B-Instruct-perso (raw file)"]["completion"]
    outcomes = completions.map(lambda text: read_completion(text).outcome)
    bar = FIGURE_2A["PersoDPO (Qwen2-0.5B, length_prior run)"]
    raw, loops = (outcomes != "ok").mean(), (outcomes == "loop").mean()
    metrics, bar_ratio = (material.sets[label]["parsed"].isna().mean() for label in ("Qwen2-5B-Instruct-perso", bar))
    table = published.results_table().set_index("Model")["Failure Ratio"]
    printed = [str(table[f"Qwen2-5B-Instruct-perso{row}"]).split(" ")[0] for row in ("", " check-2304")]
    holds = bool(raw > metrics > float(printed[0]))
    return holds, {"raw": raw, "metrics": metrics, "printed": printed, "loops": loops, "drawn": bar_ratio}


def results_table(material: Material) -> Evidence:
    """A8: which rows of the results table follow from the files."""
    parity = parity_table(material.files, material.tables)
    cells = parity[parity["group"] == "results table"]
    verdicts = cells.groupby(cells["quantity"].str.rsplit(":", n=1).str[0])["verdict"].agg(set)
    whole = [row for row in RESULT_ROWS if verdicts[row] == {"reproduced"}]
    missing = [row for row, origin in RESULT_ROWS.items() if origin is None]
    rest = [row for row in RESULT_ROWS if row not in whole and row not in missing]
    rows = {"whole": whole, "rest": rest, "missing": missing}
    return bool(whole and (rest or missing)), {name: ", ".join(labels) for name, labels in rows.items()}


def simple_log(material: Material) -> Evidence:
    """A13: the simple log is of fewer pairs than the pair set has."""
    log, pairs = published.counts()["training"]["simple"], len(material.tables["pairs/simple"])
    steps = -(-pairs // STEP_PAIRS) * log["epochs"]
    curves = published.training_curves()
    return log["pairs"] != pairs and log["optimizer_steps"] != steps, {
        "log": log, "pairs": pairs, "steps": steps, "longer_steps": -(-pairs // 8) * 3,
        "longer": curves.loc[curves["run"] == "Qwen2-5B-Instruct-FoCus-simple", "step"].max(),
    }  # fmt: skip


def baseline_split(material: Material) -> Evidence:
    """A14: the untuned row is of train prompts."""
    train, tuned, valid = (f"Qwen2-5B-{name}" for name in ("Instruct-train", "Instruct-length_prior", "benchmark"))
    rows = {"train": len(material.sets[train]), "tuned": len(material.sets[tuned])}
    failed = [set_statistics(material.files, label)["Failure Ratio"][0] for label in (train, valid)]
    return rows["train"] != rows["tuned"], {"rows": rows, "on_train": failed[0], "on_valid": failed[1]}


def saturation(_: Material) -> Evidence:
    """A15: the margin grows on after accuracy is all but 1."""
    curves = published.training_curves()
    run = curves[curves["run"] == "Qwen2-5B-Instruct-FoCus-perso-DPO"].set_index("step")
    third = run[run.index > 2 * published.counts()["training"]["perso"]["optimizer_steps"] // 3]
    sated = run[run["reward_accuracy"] > SATURATED]
    step, first, last = sated.index[0], sated["reward_margin"].iloc[0], run["reward_margin"].iloc[-1]
    return bool(last > 1.5 * first and step < 300), {
        "saturated": SATURATED, "step": step, "steps": run.index[-1], "first": first, "last": last,
        "lowest": third.min(), "highest": third.max(),
    }  # fmt: skip


def raw_copy(material: Material) -> Evidence:
    """A16: a raw file is a copy of the parsed one."""
    name = "FoCus/Qwen2-5B-Instruct.csv"
    raw, parsed = (sha256(material.files[f"{folder}/{name}"]) for folder in ("Raw Responses", "Responses"))
    failures = int(material.sets["Qwen2-5B-benchmark"]["parsed"].isna().sum())
    return raw == parsed, {"sha256": raw, "failures": failures}


def mixed_runs(material: Material) -> Evidence:
    """A17: files of one name are of different runs."""
    raw, scored, base = (
        material.sets[f"Qwen2-5B-{name}"]["response_time"]
        for name in ("Instruct-perso (raw file)", "Instruct-perso", "benchmark")
    )
    agree = np.isclose(raw, scored).mean()
    times = pd.read_csv(material.files["Responses/FoCus/Qwen2-5B-Instruct.csv"])["response_time"]
    return bool(agree < 0.5), {
        "perso": agree, "untuned": np.isclose(times, base).mean(), "responses": times.mean(), "metrics": base.mean(),
    }  # fmt: skip


def plotted_log(_: Material) -> Evidence:
    """A23: the plotted perso run is not the saved one."""
    curves, losses = published.training_curves(), published.training_losses()
    gaps = {}
    for run in ("simple", "perso"):
        plotted = curves[curves["run"] == f"Qwen2-5B-Instruct-FoCus-{run}-DPO"].set_index("step")["loss"]
        gaps[run] = (plotted - losses[losses["run"] == run].set_index("step")["loss"]).abs().dropna()
    parts = [f"{run}: largest difference {gap.max():.4f} over {len(gap)} points" for run, gap in gaps.items()]
    return bool(gaps["simple"].max() < 1e-4 < gaps["perso"].max()), {"differences": "; ".join(parts)}
