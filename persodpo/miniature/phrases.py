"""The words of the miniature world: places, what is known of them, what people are like, and how both are said.

Every list is written for this project. A field in braces is filled from a place's facts or from a person's traits.
"""

from __future__ import annotations

SYLLABLES = (
    [
        "ar",
        "bel",
        "cor",
        "dal",
        "el",
        "far",
        "gal",
        "hol",
        "in",
        "jor",
        "kel",
        "lin",
        "mar",
        "nor",
        "ol",
        "per",
        "quin",
        "ros",
        "sal",
        "tor",
        "ul",
        "ver",
        "wen",
        "yor",
        "zan",
    ],
    [
        "a",
        "be",
        "da",
        "de",
        "ga",
        "i",
        "la",
        "le",
        "ma",
        "mi",
        "na",
        "ne",
        "o",
        "ra",
        "ri",
        "sa",
        "ta",
        "te",
        "va",
        "wi",
    ],
    [
        "burg",
        "by",
        "den",
        "dorf",
        "field",
        "ford",
        "ham",
        "haven",
        "holm",
        "land",
        "mere",
        "mont",
        "mouth",
        "port",
        "stad",
        "stead",
        "ton",
        "vale",
        "ville",
        "wick",
    ],
)
FIRST_NAMES = [
    "Ada",
    "Anton",
    "Berta",
    "Carl",
    "Dora",
    "Emil",
    "Frida",
    "Georg",
    "Hanna",
    "Ivo",
    "Jana",
    "Karel",
    "Lotte",
    "Milan",
    "Nora",
    "Oskar",
    "Paula",
    "Rolf",
    "Sonja",
    "Viktor",
]
LAST_NAMES = [
    "Adler",
    "Bergman",
    "Castell",
    "Dorn",
    "Ehrlich",
    "Falk",
    "Gruber",
    "Holt",
    "Iversen",
    "Jansen",
    "Keller",
    "Lund",
    "Moreau",
    "Novak",
    "Olsen",
    "Petrov",
    "Quist",
]
LANDS = ["Arden", "Belmark", "Corvia", "Dunmoor", "Estland", "Farrow", "Galen", "Hestia", "Ilmark", "Jarnia"]
MATERIALS = ["brick", "concrete", "glass", "granite", "iron", "limestone", "marble", "oak", "sandstone", "steel"]

#: Kinds of places: what they are called, the subjects they are about, and what can be seen there.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "castle": (("history", "building"), ("the armoury", "the great hall", "the dungeon", "the chapel in the keep")),
    "museum": (
        ("art", "history"),
        ("a room of old maps", "the portrait gallery", "the coin cabinet", "the glass rooms"),
    ),
    "bridge": (
        ("engineering", "building"),
        ("the view from the middle arch", "the old toll house", "the chain towers"),
    ),
    "garden": (("nature", "art"), ("the rose walk", "the palm house", "the stone fountains", "the pond of carp")),
    "lighthouse": (("sea", "engineering"), ("the lamp room", "the keeper rooms", "the fog horn")),
    "cathedral": (("building", "music"), ("the organ", "the painted windows", "the bell tower", "the crypt")),
    "stadium": (("sport", "engineering"), ("the trophy room", "the players tunnel", "the roof walk")),
    "forest": (("nature", "hiking"), ("the oldest oak", "the deer paths", "the fern valley", "the lookout tower")),
    "harbour": (("sea", "history"), ("the fishing boats", "the rope works", "the old cranes", "the fish market")),
    "theatre": (("music", "art"), ("the painted curtain", "the royal box", "the costume rooms")),
    "railway": (("trains", "engineering"), ("the engine shed", "the signal box", "the viaduct")),
    "observatory": (("stars", "engineering"), ("the great telescope", "the star charts", "the dome at night")),
}

#: Traits that a place of the same subject answers, each as a persona sentence and as a clause of an answer.
INTERESTS: dict[str, tuple[tuple[str, str], ...]] = {
    "history": (("I love reading about history.", "as you love history"),
                ("I want to know how people lived long ago.", "since you wonder how people lived long ago")),
    "building": (("I am fascinated by old buildings.", "as old buildings fascinate you"),
                 ("I studied architecture.", "which an architect like you will enjoy")),
    "art": (("I paint in my free time.", "as you paint yourself"),
            ("I go to every exhibition I can.", "since you never miss an exhibition")),
    "engineering": (("I work as an engineer.", "which should please an engineer like you"),
                    ("I like to know how things are made.", "as you like to know how things are made")),
    "nature": (("I like to be out in nature.", "as you like to be out in nature"),
               ("I keep a small garden.", "which a gardener like you will enjoy")),
    "sea": (("I grew up by the sea.", "as you grew up by the sea"), ("I like sailing.", "since you like sailing")),
    "music": (("I sing in a choir.", "which a singer like you will enjoy"),
              ("I play the piano.", "as you play the piano yourself")),
    "sport": (("I follow every football match.", "as you follow every match"),
              ("I used to be a runner.", "since you used to be a runner")),
    "hiking": (("I go hiking on weekends.", "as you go hiking on weekends"),
               ("I collect maps of hiking trails.", "which may add a trail to your maps")),
    "trains": (("I take the train wherever I can.", "as you take the train wherever you can"),
               ("I build model railways.", "which a builder of model railways must see")),
    "stars": (("I watch the stars with my daughter.", "which you and your daughter will love"),
              ("I want to learn about astronomy.", "since you want to learn about astronomy")),
}  # fmt: skip
#: Traits about lands and kinds of places.
PLACE_TRAITS = {
    "lives": (("I live in {land}.", "not far from you, as you live in {land}"),
              ("My home is in {land}.", "which is in your own {land}")),
    "wishes": (("I would like to visit {land}.", "in {land}, which you would like to visit"),
               ("I have always wanted to see {land}.", "in the {land} you have always wanted to see")),
    "been": (("I have seen a {kind} before.", "and you have seen a {kind} before"),
             ("I have never been to a {kind}.", "your first {kind}")),
}  # fmt: skip
#: Traits that no place answers.
DISTRACTORS = (
    "I have two cats.", "I am allergic to nuts.", "My favourite colour is green.", "I drink too much coffee.",
    "I have a twin sister.", "I work night shifts.", "I do not eat meat.", "I collect stamps.", "I am afraid of spiders.",
    "I drive an old van.", "I have three brothers.", "I like to cook for friends.", "I wear glasses.",
    "I am learning to knit.", "My dog is called Bello.", "I sleep late on Sundays.",
)  # fmt: skip

#: Things that no place is about, and what people say of them; together they make distractors of many kinds.
THINGS = (
    "apples", "baking", "beaches", "bees", "bicycles", "birds", "board games", "boats", "bread", "camping", "candles",
    "cards", "cars", "caves", "cheese", "chemistry", "cherries", "chess", "chocolate", "circuses", "climbing", "clocks",
    "coins", "comics", "computers", "cooking", "crime novels", "dancing", "deserts", "dogs", "dreams", "fairs", "fashion",
    "films", "fishing", "flowers", "frogs", "ghosts", "hats", "horses", "islands", "jewellery", "jokes", "kings", "kites",
    "knights", "lakes", "languages", "law", "magic tricks", "markets", "mathematics", "medicine", "motorbikes",
    "mushrooms", "noodles", "onions", "pears", "photography", "pirates", "poems", "politics", "postcards", "potatoes",
    "pottery", "puzzles", "radios", "rain", "rice", "rivers", "robots", "sewing", "shoes", "shopping", "skating", "snow",
    "soup", "spicy food", "summer", "swimming", "tea", "tents", "tomatoes", "video games", "volcanoes", "winter", "wool",
    "zoos",
)  # fmt: skip
SAID_OF_THINGS = (
    "I like {thing}.", "I love {thing}.", "I do not like {thing}.", "I am interested in {thing}.",
    "I am not interested in {thing}.", "I really like {thing}.", "I am curious about {thing}.", "I hate {thing}.",
)  # fmt: skip
OWNED = (
    "bakery", "boat", "cat", "cellar", "cold", "dog", "farm", "flute", "goat", "guitar", "horse", "kitchen", "motorbike",
    "parrot", "pony", "rabbit", "shed", "sister", "son", "tent", "tortoise", "van", "watch", "workshop",
)  # fmt: skip
SAID_OF_OWNED = ("I have a {thing}.", "I have got a {thing}.", "I do not have a {thing}.", "I have no {thing}.")
JOBS = (
    "baker", "barber", "butcher", "carpenter", "clerk", "dentist", "driver", "farmer", "judge", "lawyer", "nurse",
    "plumber", "poet", "postman", "shepherd", "student", "tailor", "teacher", "translator", "waiter",
)  # fmt: skip
SAID_OF_JOBS = ("I am a {thing}.", "I work as a {thing}.", "I am not a {thing}.")

#: What can be asked: the questions, and the sentences that answer them. `{clause}` is where the persona comes in.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": (("I know this place, but I do not remember its name. What is it?", "What is the name of this {kind}?",
              "Can you tell me which place this is?"),
             ("This is {name}, a {kind}{clause}.", "It is called {name}, a {kind}{clause}.")),
    "where": (("Where is this {kind}?", "In which land is it?", "Where would I have to go to see it?"),
              ("{name} is in {town}, {land}{clause}.", "It stands in {town}, a town in {land}{clause}.")),
    "when": (("When was it built?", "How old is this {kind}?", "Do you know the year it was opened?"),
             ("It was opened in {year}{clause}.", "{name} dates from {year}{clause}.")),
    "who": (("Who built it?", "Do you know who designed this {kind}?", "Whose work is it?"),
            ("It was designed by {builder}{clause}.", "{builder} built it{clause}.")),
    "size": (("How large is it?", "Is it a big {kind}?", "How far does it reach?"),
             ("It measures {size} metres{clause}.", "From end to end it has {size} metres{clause}.")),
    "material": (("What is it made of?", "Which material did they use?"),
                 ("It is made of {material}{clause}.", "They used {material}{clause}.")),
    "see": (("What can I see there?", "What should I not miss?", "Is there something special to see?"),
            ("Do not miss {sight}{clause}.", "You can see {sight}{clause}.", "Most people come for {sight}{clause}.")),
    "price": (("What does a visit cost?", "Is it expensive to get in?"),
              ("A ticket costs {price} crowns{clause}.", "You pay {price} crowns at the gate{clause}.")),
    "like": (("Do you think I would like it?", "Would it be something for me?"),
             ("I think so{clause}: there is {sight}.", "You would{clause}, above all {sight}.")),
}  # fmt: skip
#: Sentences that make an answer longer.
MORE = (
    "It was opened in {year}.", "{builder} designed it.", "It is made of {material}.", "You will find it in {town}.",
    "It measures {size} metres.", "A ticket costs {price} crowns.", "There is also {sight2}.", "It is closed on {day}s.",
)  # fmt: skip
OPENINGS = ("", "", "", "Good question. ", "Yes. ", "Of course. ", "I am glad you ask. ", "Sure. ")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday"]
