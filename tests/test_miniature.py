"""The miniature world: FoCus's shape, repeatable, varied, and answers that use what the person said."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from persodpo.cli import app
from persodpo.dialogues import focus_json
from persodpo.errors import PersodpoError
from persodpo.miniature import phrases
from persodpo.miniature.world import focus_world, write_world
from persodpo.runfolder import DATA


@pytest.fixture(scope="module")
def world() -> list[dict]:
    return focus_world(1000, seed=7)["data"]


def last_answer(dialogue: dict) -> str:
    return dialogue["utterance"][-1][f"dialogue{len(dialogue['utterance'])}"][-1]


def test_the_world_is_read_as_focus_is(tmp_path):
    train, valid = write_world(tmp_path, 40, 20, seed=3)
    table, held_out = focus_json(train, "train"), focus_json(valid, "valid")
    assert (len(table), len(held_out)) == (40, 20)
    assert not set(table["dialogue_id"]) & set(held_out["dialogue_id"])
    assert table["personas"].map(len).eq(5).all()
    assert table["context"].str.fullmatch(r"User1: .+(\nUser2: .+\nUser1: .+)*").all()
    content = json.loads(train.read_text())["data"]
    assert table["reference"].tolist() == [last_answer(dialogue) for dialogue in content]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / folder, 20, 20, seed)
    same, again, other = ((tmp_path / folder / "train.json").read_bytes() for folder in "abc")
    assert same == again != other


def test_the_committed_sample_is_what_the_command_makes(tmp_path):
    done = CliRunner().invoke(app, ["miniature", "--folder", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    for name in ("train.json", "valid.json"):
        assert (tmp_path / name).read_bytes() == (DATA / "mini" / name).read_bytes()


def test_turns_grow_by_one_exchange(world):
    for dialogue in world[:100]:
        whole = dialogue["utterance"][-1][f"dialogue{len(dialogue['utterance'])}"]
        for number, entry in enumerate(dialogue["utterance"], 1):
            assert set(entry) == {f"persona_grounding{number}", *(f"dialogue{n}" for n in range(1, number + 1))}
            assert entry[f"dialogue{number}"] == whole[: 2 * number]


def test_an_answer_takes_up_the_trait_it_names_and_no_distractor(world):
    clauses = {sentence: clause for pairs in phrases.INTERESTS.values() for sentence, clause in pairs}
    said = [
        (phrases.SAID_OF_THINGS, phrases.THINGS),
        (phrases.SAID_OF_OWNED, phrases.OWNED),
        (phrases.SAID_OF_JOBS, phrases.JOBS),
    ]
    made = {way.format(thing=thing) for ways, things in said for way in ways for thing in things}
    distractors = made | set(phrases.DISTRACTORS)
    for dialogue in world:
        number = len(dialogue["utterance"])
        used = dialogue["utterance"][-1][f"persona_grounding{number}"]
        assert sum(used) == 1
        sentence = dialogue["persona"][used.index(True)]
        assert sentence not in distractors
        if sentence in clauses:
            assert clauses[sentence] in last_answer(dialogue)
        assert len(set(dialogue["persona"])) == 5
        assert set(dialogue["persona"]) & distractors


def test_answers_are_varied(world):
    answers = [last_answer(dialogue) for dialogue in world]
    assert len(set(answers)) > 950
    words = [len(answer.split()) for answer in answers]
    assert min(words) < 12
    assert max(words) > 35
    starts = Counter(" ".join(answer.split()[:2]) for answer in answers)
    assert starts.most_common(1)[0][1] < 150
    questions = {dialogue["utterance"][-1][f"dialogue{len(dialogue['utterance'])}"][-2] for dialogue in world}
    assert len(questions) > 40


def test_no_field_stays_unfilled(world):
    for dialogue in world:
        number = len(dialogue["utterance"])
        texts = [*dialogue["persona"], *dialogue["knowledge"], *dialogue["utterance"][-1][f"dialogue{number}"]]
        assert not any("{" in text for text in texts)


def test_too_small_a_world_is_refused(tmp_path):
    with pytest.raises(PersodpoError, match="A world of 19 dialogues is too small to learn from; ask for 20 or more"):
        write_world(tmp_path, 19, 20, seed=1)
    assert list(tmp_path.iterdir()) == []
