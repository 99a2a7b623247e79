"""Sixteen short dialogues whose answers are known: what the probes ask every scorer about.

Written for this purpose, about landmarks and the people who ask after them, as in FoCus. Topics differ from one case to
the next, so that a persona or a context taken from another case fits worse than the own one.
"""

from __future__ import annotations

from typing import NamedTuple

from persodpo.scoring.scorers import Item


class Case(NamedTuple):
    """A dialogue, a fitting reply, and a sentence that denies the first persona sentence.

    Attributes:
        personas: Persona sentences; the first is the one that is copied or denied.
        context: Turns, one a line.
        reply: Answers the last turn and fits the persona.
        denial: Says the opposite of the first persona sentence.
    """

    personas: tuple[str, ...]
    context: str
    reply: str
    denial: str

    def item(self, response: str | None = None, *, personas: tuple[str, ...] | None = None, context: str = "") -> Item:
        """Return the case as an item, the reply unless another response is given; the reply is the reference."""
        found = self.reply if response is None else response
        return Item(personas or self.personas, context or self.context, self.reply, found)


def _case(personas: tuple[str, ...], turns: tuple[str, ...], reply: str, denial: str) -> Case:
    """Put the speakers before the turns: User1 asks first and last."""
    context = "\n".join(f"User{1 + place % 2}: {turn}" for place, turn in enumerate(turns))
    return Case(personas, context, reply, denial)


CASES = (
    _case(
        ("I like old castles.", "I want to visit Scotland.", "I am interested in kings."),
        ("What is this castle?", "It is an old castle in Scotland.", "Which king lived in the castle?"),
        "You are interested in kings, so you will like this: the king of Scotland lived in the castle for many years.",
        "I do not like old castles.",
    ),
    _case(
        ("I love art museums.", "I like paintings.", "I am a student of art."),
        ("What is this place?", "It is a museum of art.", "Are there paintings in the museum?"),
        "Yes, the museum has many paintings, and since you like paintings you will love its art collection.",
        "I do not love art museums.",
    ),
    _case(
        ("I like hiking in the mountains.", "I love nature.", "I live near a forest."),
        ("How high is this mountain?", "The mountain is 3,000 meters high.", "Can I go hiking on the mountain?"),
        "Yes, you can go hiking on the mountain, the trails lead through a forest and you will enjoy the nature.",
        "I do not like hiking in the mountains.",
    ),
    _case(
        ("I am interested in churches.", "I am a religious person.", "I like old buildings."),
        ("What is this building?", "It is a church of the 12th century.", "Who built the church?"),
        "The church was built by a bishop in the 12th century, which should interest you as a religious person.",
        "I am not interested in churches.",
    ),
    _case(
        ("I like swimming in lakes.", "I have a boat.", "I enjoy fishing."),
        ("Where is this lake?", "The lake is in the north of the state.", "Are there fish in the lake?"),
        "Yes, the lake is full of fish, so you can go fishing from your boat.",
        "I do not like swimming in lakes.",
    ),
    _case(
        ("I love trains.", "I want to travel by rail.", "I have never been to a railway station in Germany."),
        ("What is this station?", "It is the central railway station.", "When was the railway station opened?"),
        "The railway station was opened in 1890, and you can travel from it by rail to every city in Germany.",
        "I do not love trains.",
    ),
    _case(
        ("I like football.", "I support a club in England.", "I want to see a stadium."),
        ("What is this stadium?", "It is the home of a football club.", "How many people fit in the stadium?"),
        "The stadium has 40,000 seats, and its football club is one of the oldest in England.",
        "I do not like football.",
    ),
    _case(
        ("I am interested in ships.", "I like the navy.", "I want to learn about war."),
        ("What is this ship?", "It is a ship of the navy.", "Was the ship used in the war?"),
        "Yes, the navy used the ship in the war, which you want to learn about.",
        "I am not interested in ships.",
    ),
    _case(
        ("I love animals.", "I like zoos.", "I have a dog."),
        ("What is this place?", "It is a zoo.", "What animals live in the zoo?"),
        "The zoo has lions, bears and many other animals, so as you love animals you should visit it.",
        "I do not love animals.",
    ),
    _case(
        ("I study at a university.", "I want to be a scientist.", "I like libraries."),
        ("What is this university?", "It was founded in 1850.", "Does the university have a library?"),
        "Yes, the university has a large library, which you will like, and many students use it.",
        "I do not study at a university.",
    ),
    _case(
        ("I like bridges.", "I am an engineer.", "I want to cross the river."),
        ("What is this bridge?", "It is a bridge over the river.", "How long is the bridge?"),
        "The bridge is 500 meters long, and as an engineer you may know that it crosses the river on steel arches.",
        "I do not like bridges.",
    ),
    _case(
        ("I like music.", "I enjoy the opera.", "I would like to visit a theatre."),
        ("What is this theatre?", "It is an opera house.", "What music is played in the theatre?"),
        "The opera house plays music by many composers, and you enjoy the opera.",
        "I do not like music.",
    ),
    _case(
        ("I love islands.", "I like the beach.", "I want to see the sea."),
        ("Where is this island?", "The island lies in the sea near Greece.", "Is there a beach on the island?"),
        "Yes, the island has a long beach where you can see the sea.",
        "I do not love islands.",
    ),
    _case(
        ("I like flowers.", "I have a garden.", "I am interested in plants."),
        ("What is this garden?", "It is a botanical garden.", "Which plants grow in the garden?"),
        "Many flowers and rare plants grow in the garden, which is good for someone who is interested in plants.",
        "I do not like flowers.",
    ),
    _case(
        ("I am interested in volcanoes.", "I have never seen lava.", "I like geology."),
        ("What is this volcano?", "It is an active volcano.", "When did the volcano erupt?"),
        "The volcano last erupted in 1984, and its lava covered the land, which you have never seen.",
        "I am not interested in volcanoes.",
    ),
    _case(
        ("I like shopping.", "I live in the city.", "I am looking for a restaurant."),
        ("What is this market?", "It is a market with many shops.", "Is there a restaurant in the market?"),
        "Yes, between the shops of the market there is a restaurant, so you can go shopping and eat in the city.",
        "I do not like shopping.",
    ),
)
