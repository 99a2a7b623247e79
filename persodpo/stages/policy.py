"""The model that arms start from, and that `weights: policy` of a backend names."""

from __future__ import annotations

import json
from pathlib import Path

import persodpo.pairs
from persodpo.artifacts import RunFolder


def start_policy(run: RunFolder) -> str | Path:
    """Return the policy of a run's profile; the small one is made from the run's own texts if need be."""
    from persodpo.training.policy import make_small_policy  # noqa: PLC0415 - torch is slow to load

    if run.profile.policy.model != "small":
        return run.profile.policy.model
    prompts = persodpo.pairs.prompt_table(run.read("dialogues"), run.profile)
    responses = run.read("responses")
    parsed = responses[responses["outcome"].eq("ok")].merge(prompts, on="dialogue_id")
    texts = [json.dumps({"response": text}, ensure_ascii=False) for text in parsed["response"]]
    examples = list(zip(parsed["prompt"], texts, strict=True))
    return make_small_policy(examples, run.profile.policy.small, policy_folder(run))


def policy_folder(run: RunFolder) -> Path:
    """Return where the small policy of a run lies, whether it is there or not."""
    return run.root / "policy"
