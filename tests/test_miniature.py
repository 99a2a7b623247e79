"""The miniature world: FoCus's shape, repeatable, varied, and answers that use what the person said."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from persodpo.dialogues import focus_json
from persodpo.errors import PersodpoError
from persodpo.files import DATA
from persodpo.miniature.judge import judge, judge_answer
from persodpo.miniature.world import PHRASES, focus_world, write_world


@pytest.fixture(scope="module")
def world() -> list[dict]:
    return focus_world(1000, seed=7)["data"]


def turns_of(dialogue: dict) -> list[str]:
    return dialogue["utterance"][-1][f"dialogue{len(dialogue['utterance'])}"]


def test_the_world_is_read_as_focus_is(tmp_path):
    train, valid = write_world(tmp_path, 40, 20, seed=3)
    table, held_out = focus_json(train, "train"), focus_json(valid, "valid")
    assert (len(table), len(held_out)) == (40, 20)
    assert not set(table["dialogue_id"]) & set(held_out["dialogue_id"])
    assert table["personas"].map(len).eq(5).all()
    assert table["context"].str.fullmatch(r"User1: .+(\nUser2: .+\nUser1: .+)*").all()
    content = json.loads(train.read_text())["data"]
    assert table["reference"].tolist() == [turns_of(dialogue)[-1] for dialogue in content]


def test_the_committed_sample_is_what_the_generator_makes_under_its_seed(tmp_path):
    for path, other in zip(
        write_world(tmp_path, 160, 40, 44), write_world(tmp_path / "other", 160, 40, 45), strict=True
    ):
        assert path.read_bytes() == (DATA / "mini" / path.name).read_bytes() != other.read_bytes()


def test_an_answer_takes_up_the_trait_it_names_and_no_distractor(world):
    clauses = {sentence: clause for pairs in PHRASES.interests.values() for sentence, clause in pairs}
    said = [
        (PHRASES.said_of_things, PHRASES.things),
        (PHRASES.said_of_owned, PHRASES.owned),
        (PHRASES.said_of_jobs, PHRASES.jobs),
    ]
    made = {way.format(thing=thing) for ways, things in said for way in ways for thing in things}
    distractors = made | set(PHRASES.distractors)
    for dialogue in world:
        assert not any("{" in text for text in [*dialogue["persona"], *dialogue["knowledge"], *turns_of(dialogue)])
        number = len(dialogue["utterance"])
        used = dialogue["utterance"][-1][f"persona_grounding{number}"]
        assert sum(used) == 1
        sentence = dialogue["persona"][used.index(True)]
        assert sentence not in distractors
        if sentence in clauses:
            assert clauses[sentence] in turns_of(dialogue)[-1]
        assert len(set(dialogue["persona"])) == 5
        assert set(dialogue["persona"]) & distractors


def test_references_are_grounded_and_others_answers_are_not(world):
    """An answer to another dialogue speaks of another person and often answers another question."""
    turns = [turns_of(dialogue) for dialogue in world[:200]]
    contexts = ["\n".join(f"User{1 + place % 2}: {text}" for place, text in enumerate(said[:-1])) for said in turns]
    prompts = [(dialogue["persona"], context) for dialogue, context in zip(world, contexts, strict=False)]
    own = [judge_answer(*prompt, said[-1]) for prompt, said in zip(prompts, turns, strict=True)]
    assert all(all(found[:-1]) for found in own)
    others = [judge_answer(*prompt, said[-1]) for prompt, said in zip(prompts, [*turns[1:], turns[0]], strict=True)]
    assert sum(all(found[:-1]) for found in others) < 10


PERSONAS = ["I like sailing.", "I wear glasses.", "I live in Galen.", "I paint in my free time.", "I like tea."]
CONTEXT = (
    "User1: Where is this lighthouse?\nUser2: It stands in Belaby, a town in Galen, not far from you, as you live in "
    "Galen. It measures 40 metres.\nUser1: "
)


@pytest.mark.parametrize(
    ("question", "answer", "parts", "added"),
    [
        ("When was it built?", "Sure. It was opened in 1720, since you like sailing.", [1, 1, 1, 1], 0),
        ("When was it built?", "It is made of oak, since you like sailing.", [0, 1, 1, 1], 1),
        ("When was it built?", "It was opened in 1720.", [1, 0, 1, 1], 0),
        ("When was it built?", "It was opened in 1720, as you paint yourself.", [1, 0, 1, 1], 0),  # true, but of no matter
        ("When was it built?", "It was opened in 1720, as you love history.", [1, 0, 0, 1], 0),  # of somebody else
        ("When was it built?", "It was opened in 1720, since you like sailing. It measures 90 metres.", [1, 1, 0, 1], 1),
        ("When was it built?", "It was opened in 1720, since you like sailing. It was opened in 1721.", [1, 1, 0, 1], 1),
        ("How large is it?", "It measures 40 metres, since you like sailing.", [1, 1, 1, 1], 0),
        ("How large is it?", "It measures 90 metres, since you like sailing.", [0, 1, 0, 1], 1),
        ("What can I see there?", "Do not miss the lamp room, since you like sailing. It is closed on Mondays. "
         "It is closed on Mondays.", [1, 1, 1, 0], 2),
        ("What can I see there?", "You can see the fog horn, since you like sailing. It is made of oak. Ada Holt designed "
         "it. A ticket costs 3 crowns. It was opened in 1720.", [1, 1, 1, 0], 4),
    ],
)  # fmt: skip
def test_judgements_by_hand(question, answer, parts, added):
    assert judge_answer(PERSONAS, CONTEXT + question, answer) == (*map(bool, parts), added)


def test_a_failure_is_not_grounded():
    dialogues = pd.DataFrame({"dialogue_id": ["d"], "personas": [PERSONAS], "context": [CONTEXT + "Who built it?"]})
    answers = ["Ada Holt built it, since you like sailing."] * 2
    responses = pd.DataFrame({"dialogue_id": "d", "model": ["a", "b"], "outcome": ["ok", "loop"], "response": answers})
    assert judge(dialogues, responses)["grounded"].tolist() == [True, False]


def test_too_small_a_world_is_refused(tmp_path):
    with pytest.raises(PersodpoError, match="A world of 19 dialogues is too small to learn from; ask for 20 or more"):
        write_world(tmp_path, 19, 20, seed=1)
    assert list(tmp_path.iterdir()) == []
