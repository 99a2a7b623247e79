"""Profiles: what is accepted, what is refused, and what the message says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from persodpo.config import PROFILES, load_profile, profile_names, with_overrides
from persodpo.errors import PersodpoError
from persodpo.settings import Profile


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_load_and_round_trip(name, tmp_path):
    loaded = load_profile(name)
    assert loaded.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(loaded.to_yaml())
    assert load_profile(copy) == loaded


@pytest.mark.parametrize("name", profile_names())
def test_every_key_of_a_profile_is_commented(name):
    lines = (PROFILES / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if re.match(r"\s*\w+:", line)]
    bare = [line for line in keys if "#" not in line and not re.match(r"\w+:$", line)]
    assert len(keys) > 30
    assert bare == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pairs.low_quantil=0.3", ["pairs.low_quantil", "did you mean 'low_quantile'", "high_quantile"]),
        ("scorin.weights=1", ["'scorin' is no section", "scoring"]),
        ("scoring.coherence=fixed", ["scoring.coherence", "'as_released' or 'corrected'", "'fixed'"]),
        ("scoring.weights.coherence=0.5", ["scoring.weights", "sum to 1", "1.36", "{coherence: 0.3676"]),
        ("scoring.weights.coherence=-0.1", ["scoring.weights.coherence", "greater than or equal to 0"]),
        ("scoring.format_bonus=.nan", ["scoring.format_bonus", "finite"]),
        ("pairs.low_quantile=0.9", ["low_quantile (0.9)", "high_quantile (0.6)"]),
        ("dialogues.train_size=many", ["dialogues.train_size", "integer", "'many'"]),
        ("dialogues.source=focus_json", ["dialogues", "train_file or valid_file"]),
        ("generation.models=[]", ["generation.models", "at least 1"]),
        ("generation.models=[a, a]", ["generation.models", "'a' stands twice"]),
        ("pairs.sets=[perso, perso]", ["pairs.sets", "'perso' stands twice"]),
        ("name=../x", ["name", "pattern"]),
        ("pairs.low_quantile", ["section.key=value"]),
        ("pairs.sets=[", ["not valid YAML"]),
        ("pairs={}", ["pairs.sets is missing"]),
    ],
)
def test_impossible_settings_are_refused_by_path_and_remedy(override, words):
    with pytest.raises(PersodpoError) as refused:
        load_profile("release", [override])
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_overrides_are_typed_and_the_profile_is_frozen():
    changed = load_profile("release", ["pairs.low_quantile=0.3", "pairs.sets=[perso]", "engine.ray_workers=3"])
    assert (changed.pairs.low_quantile, changed.pairs.sets, changed.engine.ray_workers) == (0.3, ("perso",), 3)
    assert (
        with_overrides(changed, ["pairs.low_quantile=0.4", "pairs.sets=[simple, perso]"]).pairs == load_profile().pairs
    )
    with pytest.raises(ValidationError):
        changed.name = "other"


def test_digest_follows_results_not_places():
    base = load_profile("release")
    assert load_profile("release", ["paths.runs=/elsewhere", "engine.ray_workers=1"]).digest() == base.digest()
    assert load_profile("release", ["pairs.high_quantile=0.7"]).digest() != base.digest()


def test_a_profile_that_is_no_profile(tmp_path: Path):
    for content, word in (("- 1\n", "sections"), ("a: [", "not valid YAML"), ("!!python/object:os.system {}", "YAML")):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(PersodpoError, match=word):
            load_profile(path)
    with pytest.raises(PersodpoError, match=r"neither a shipped profile \(.*release"):
        load_profile("nonesuch")


def test_schema_and_file_have_the_same_keys():
    raw = yaml.safe_load((PROFILES / "release.yaml").read_text())
    assert list(raw) == list(Profile.model_fields)


def keys_of(section, path=""):
    """Yield the path of every key, in the file's order; entries of lists have keys of their own kind."""
    for key, value in section.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")


def test_all_profiles_have_the_same_keys_in_the_same_order():
    keys = {name: list(keys_of(yaml.safe_load((PROFILES / f"{name}.yaml").read_text()))) for name in profile_names()}
    assert len(keys) > 1
    assert len(keys["release"]) > 100
    for name, found in keys.items():
        assert found == keys["release"], name
