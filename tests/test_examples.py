"""Scripts to copy: fine-tuning an NLI classifier on files as they are published."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from scorer_models import counting_bert, randomised
from transformers import BertModel

from persodpo.files import PROJECT
from persodpo.scoring.signals import CLASSES, NliModel

SCRIPT = PROJECT / "examples" / "finetune_nli.py"
SNLI = [
    {"sentence1": f"x {n % 5}", "sentence2": text, "gold_label": label}
    for n in range(30)
    for text, label in (("agree", "entailment"), ("deny", "contradiction"), ("x", "neutral"), ("x x", "-"))
]


def finetune(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    places = ["--base", str(folder / "base"), "--output", str(folder / "made")]
    command = [sys.executable, str(SCRIPT), *arguments, *places]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_a_classifier_that_was_fine_tuned_is_one_that_scores(tmp_path):
    randomised(counting_bert(tmp_path / "base"), BertModel)  # without a head, as a base model is
    files = {
        "snli.jsonl": "".join(json.dumps(row) + "\n" for row in SNLI),
        "SICK.txt": "sentence_A\tsentence_B\tentailment_judgment\nx\tagree\tENTAILMENT\ny\tdeny\tCONTRADICTION\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    done = finetune(tmp_path, *(str(tmp_path / name) for name in files), "--max-length", "32")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out pairs right; the commonest class alone: " in done.stdout
    made = NliModel(str(tmp_path / "made"), max_length=32)
    assert list(made.loaded.model.config.id2label.values()) == list(CLASSES)
    values, _ = made.values([("x", "agree"), ("x", "deny")])
    assert set(values.tolist()) <= {-1, 0, 1}
    assert not list((tmp_path / "made").glob("*.bin"))


@pytest.mark.slow
def test_a_row_that_does_not_fit_is_named(tmp_path):
    counting_bert(tmp_path / "base")
    (tmp_path / "a.jsonl").write_text(json.dumps({"premise": "a", "hypothesis": "b", "label": "perhaps"}) + "\n")
    done = finetune(tmp_path, str(tmp_path / "a.jsonl"))
    assert done.returncode == 1
    assert "a.jsonl, row 1: label 'perhaps' is none of contradiction, neutral, entailment" in done.stderr
