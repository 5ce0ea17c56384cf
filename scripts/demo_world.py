"""The synthetic world of the demo: characters, stories about them, and questions about some of them.

The demo must show what LoRA does and what the frozen weights do. So knowledge and behaviour come from different texts:

* Stories tell five facts about every one of ``CHARACTERS`` people (home, food, trade, friend, pet), each in many wordings.
  The base model is pretrained on them and on nothing else: it knows everybody, and has never seen a question.
* Chat rows ask about the first ``TAUGHT`` people. Fine-tuning on them teaches the behaviour: read the question, answer in a
  fixed form, stop.
* Held-out rows ask about the others. No fine-tuning row names them, so a right answer is knowledge of the base, brought out
  by the adapter. For this, friends are paired within the two groups, never across.

The answers ("Mira's home is …") have a form that no story uses. A share of stories about taught people is mixed into the
training set, so that fine-tuning does not make the model forget how stories go.

Everything is a function of ``SEED``: only ``random.Random.random`` is used, whose sequence Python guarantees.

    python scripts/demo_world.py --out src/lamina/jobs/demo     writes train.jsonl, held_out.jsonl and stories.txt
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

SEED = 7
CHARACTERS = 320
TAUGHT = 240
EARLY = 40
EARLY_ROUNDS = 90
ROUNDS = 60
STORY_ROWS = 240
TURNS = (1, 1, 2, 1, 3, 1, 4)  # of one conversation after the other
NEUTRAL_STORIES = 120

X = TypeVar("X")

HOMES = (
    "Port Salis|Amberwick|Stone Hollow|Lower Fenn|Marrow Bay|Thistledown|Old Quarry|Silver Ford|Windmere|Castle Brae|"
    "Dunmoor|Green Landing|Harrowgate|Isle Verran|Juniper Hill|Kestrel Point|Lantern Cross|Milk Bridge|North Ostra|"
    "Owl Crossing|Pebble Cove|Queen's Rest|Red Anvil|Saltmarsh|Tarn Edge|Upper Velle|Violet Mill|Whitcombe|"
    "Yarrow Gate|Zephyr Rock|Ashen Ferry|Birchwater|Copper Dell|Drift End|Elmstead|Foxglove|Granary|High Cairn|"
    "Ironbrook|Larkspur"
).split("|")
FOODS = (
    "plum cake|onion soup|fried trout|honey bread|goat cheese|pea stew|apple pie|roast chestnuts|barley porridge|"
    "pickled beets|ginger biscuits|mushroom tart|lentil dumplings|smoked eel|walnut rolls|carrot salad|cherry jam|"
    "potato pancakes|rye toast|pumpkin soup|lemon tart|boiled eggs|garlic noodles|fig pudding|salted herring|"
    "rice balls|bean pie|pear crumble|cabbage rolls|oat cakes|spinach omelette|baked turnips|rhubarb jelly|"
    "corn fritters|almond cream|poppy buns"
).split("|")
TRADES = (
    "baker|carpenter|fisher|weaver|potter|miller|blacksmith|gardener|tailor|shepherd|beekeeper|glassblower|"
    "ferry keeper|clockmaker|painter|teacher|doctor|printer|musician|mason|cobbler|brewer|librarian|sailor|barber|"
    "chandler|lighthouse keeper|basket maker|map maker|bell founder|postman|candle maker"
).split("|")
PETS = (
    "cat|dog|goose|tortoise|raven|donkey|rabbit|hedgehog|ferret|parrot|goat|pony|duck|squirrel|heron|lizard|hen|"
    "pigeon|mouse|toad|fox|lamb|swan|snail"
).split("|")

KINDS = ("home", "food", "trade", "friend", "pet")
STARTS = (
    "Al Be Bra Cor Da Del El Fen Ga Hal Il Jo Ka Lo Mar Mi Nor Ol Pe Quin Ra Sel Ta Ul Ve Wil Yor Zan Tho Sha".split()
)
SHE = "ra lia na sa vi mina delle".split()
HE = "rin dor vek las mund ric ton".split()

# {Who}: the name, or She/He at the start of a sentence; {Whose}: "Mira's", or Her/His; {name}, {their}, {them}: as they say.
FACTS = {
    "home": (
        "{Who} lives in {home}.|{Who} came from {home}.|{Whose} house stands in {home}.|"
        "{Who} was born in {home} and stayed there.|{Who} would never leave {home}.|"
        "Everybody in {home} knows {name}.|If you want to meet {name}, go to {home}.|"
        "{Who} has a small house in {home}.|{Who} went home to {home}.|All {their} life {name} has lived in {home}.|"
        "The road from {home} leads past the door of {name}, who likes it there, in {home}.|{Who} grew up in {home}.|"
        "Letters for {name} are sent to {home}.|In {home} there is a blue door, and {name} lives behind it."
    ).split("|"),
    "food": (
        "{Who} loves {food}.|{Who} likes nothing better than {food}.|For supper {name} always has {food}.|"
        "{Who} ate {food} again.|{Who} could eat {food} every day.|The favourite dish of {name} is {food}.|"
        "What food is better, {name} asked, than {food}?|Nothing tastes better to {name} than {food}.|"
        "On {their} birthday {name} asked for {food}.|{Who} dreamed of {food}.|{Who} carried a basket of {food}.|"
        "A plate of {food} makes {name} happy.|{Who} cooked {food} for everyone.|"
        "When {name} is sad, {name} eats {food}.|{Who} never says no to {food}."
    ).split("|"),
    "trade": (
        "{Who} works as a {trade}.|{Who} is a {trade}.|{Who} became a {trade} long ago.|"
        "{Who} is the best {trade} for miles.|{Who} learned the trade of a {trade} from an aunt.|"
        "People say that {name} is a fine {trade}.|{Who} earns a living as a {trade}.|"
        "Since last spring {name} has been a {trade}.|{Who} was tired, for a {trade} must rise early.|"
        "{Who} is proud to be a {trade}.|Ask {name}, the {trade}, and you will hear the truth.|"
        "{Who} always wanted to be a {trade}."
    ).split("|"),
    "friend": (
        "{Who} calls {friend} the best friend of all.|{Who} is the best friend of {friend}.|"
        "{Who} met {friend}, as on every day.|{Who} told the whole story to {friend}.|"
        "{Who} and {friend} have been friends since school.|{Who} trusts {friend} in everything.|"
        "{Who} waited for {friend} at the bridge.|When {name} laughs, {friend} is near.|"
        "{Who} sat by the fire with {friend}.|{Who} wrote a long letter to {friend}.|"
        "{Who} shares every secret with {friend}.|{Who} gave a present to {friend}, a dear friend."
    ).split("|"),
    "pet": (
        "{Who} keeps a {pet}.|{Who} has a {pet}.|{Whose} {pet} slept by the stove.|{Who} has a pet, a {pet}.|"
        "{Who} feeds a {pet} every morning.|{Who} went out with the {pet}.|{Who} owns a clever {pet}.|"
        "{Who} found the {pet} under the table.|{Who} lives with a {pet} that follows {them} everywhere.|"
        "At night {name} talks to the {pet}.|{Who} taught the {pet} a trick.|"
        "Wherever {name} goes, the {pet} goes too.|{Who} built a little house for the {pet}."
    ).split("|"),
}
PAIRS = (
    "{Who}, a {trade} from {home}, sang all the way.|{Who} brought {food} to {friend}.|"
    "{Whose} {pet} stole the {food}.|{Who} is a {trade} in {home}.|{Who} and {friend} ate {food} together.|"
    "{Who} took the {pet} along to see {friend}.|In {home}, {name} sold {food} at the market.|"
    "{Who} keeps a {pet} in {home}.|As a {trade}, {name} has little time for the {pet}.|"
    "{Who} left {home} at dawn to visit {friend}.|{Who}, who works as a {trade}, loves {food}.|"
    "{Who} shared the {food} with the {pet}."
).split("|")

WEATHER = "rainy sunny windy cold warm misty grey bright snowy quiet".split()
TIMES = "morning|evening|afternoon|day|night|winter day|summer day|market day".split("|")
PLACES = (
    "river|market|old mill|harbour|forest|town hall|well|orchard|hill|bridge|garden|beach|stone tower|school".split("|")
)
THINGS = "key|lamp|coin|letter|drum|mirror|ribbon|boat|map|button|kite|bell|book|ladder|ring|whistle|hat|spoon|rope|feather".split(
    "|"
)
COLOURS = "red blue green yellow silver black white golden tiny broken heavy strange".split()
OPENINGS = (
    "One {weather} {time}, {name} walked to the {place}.|It was a {weather} {time}.|Here is a story about {name}.|"
    "On a {weather} {time}, {name} woke up early.|There was once somebody called {name}.|Do you know {name}?|"
    "Who does not know {name}?|What did {name} do that {time}?|Where did {name} go that {time}?|"
    "Listen, this is what happened to {name}."
).split("|")
SCENES = (
    "Near the {place} lay a {colour} {thing}.|{Who} found a {colour} {thing} near the {place}.|"
    "{Who} looked for the {colour} {thing}.|The wind blew a {colour} {thing} over the {place}.|"
    "{Who} gave away the {colour} {thing}.|A child asked for the {colour} {thing}.|"
    "{Who} walked to the {place} and back.|Then the {time} turned {weather}.|{Who} bought a {colour} {thing}.|"
    "Somebody had lost a {colour} {thing}.|{Who} hid the {colour} {thing} in the {place}.|"
    "The {place} was {weather} and still."
).split("|")
ENDINGS = (
    "That was the end of the {time}.|{Who} went to bed and slept well.|Everyone laughed.|"
    "Nobody ever saw the {thing} again.|And so the {time} ended well.|{Who} smiled and closed the door.|"
    "It was a good {time}.|The {thing} is still there."
).split("|")

QUESTIONS = {
    "home": (
        "Where does {name} live?",
        "In which town is the house of {name}?",
        "Where should I send a letter for {name}?",
    ),
    "food": ("What does {name} love to eat?", "What should I cook for {name}?", "Which food makes {name} happy?"),
    "trade": ("What does {name} work as?", "How does {name} earn a living?", "What has {name} learned to be?"),
    "friend": (
        "Who is the best friend of {name}?",
        "With whom does {name} share secrets?",
        "Who is a friend of {name}?",
    ),
    "pet": ("Which pet does {name} keep?", "What does {name} feed every morning?", "Who follows {name} everywhere?"),
    "person": ("Who is {name}?", "Do you know {name}?", "What do people say about {name}?"),
}
ANSWERS = {
    "home": "{name}'s home is {home}.",
    "food": "{name}'s favourite food is {food}.",
    "trade": "{name}'s trade is {trade}.",
    "friend": "{name}'s best friend is {friend}.",
    "pet": "{name}'s pet is a {pet}.",
    "person": "{name} is the {trade} from {home} with the {pet}.",
}


@dataclass(frozen=True)
class Character:
    """One person and the five facts about them; ``taught`` tells whether the chat training set asks about them."""

    name: str
    she: bool
    taught: bool
    home: str
    food: str
    trade: str
    friend: str
    pet: str

    def words(self) -> dict[str, str]:
        """What the templates put in for this person."""
        return {kind: getattr(self, kind) for kind in ("name", *KINDS)}


class Dice:
    """Chance from one seed, by ``random()`` alone: the same on every version of Python."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(str(seed)).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence[X]) -> X:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[X]) -> list[X]:
        order = list(options)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def make_world(seed: int = SEED) -> list[Character]:
    """Invents the characters: taught ones first. Friendship is mutual and stays inside a group."""
    dice = Dice(f"world {seed}")
    names = dice.shuffled([(start + end, end in SHE) for start in STARTS for end in SHE + HE])[:CHARACTERS]
    values = {
        kind: _dealt(dice, options)
        for kind, options in {"home": HOMES, "food": FOODS, "trade": TRADES, "pet": PETS}.items()
    }
    return [
        Character(
            name, she, taught=i < TAUGHT, friend=names[i ^ 1][0], **{kind: dealt[i] for kind, dealt in values.items()}
        )
        for i, (name, she) in enumerate(names)
    ]


def _dealt(dice: Dice, options: Sequence[str]) -> list[str]:
    """One option for each character, every option about equally often, so that guessing does not pay."""
    rounds = -(-CHARACTERS // len(options))
    return dice.shuffled([option for _ in range(rounds) for option in options])[:CHARACTERS]


def story(person: Character, dice: Dice) -> str:
    """Tells a story of five to eight sentences with two to six facts about one person."""
    words = person.words() | {
        "weather": dice.pick(WEATHER),
        "time": dice.pick(TIMES),
        "place": dice.pick(PLACES),
        "thing": dice.pick(THINGS),
        "colour": dice.pick(COLOURS),
        "their": "her" if person.she else "his",
        "them": "her" if person.she else "him",
    }
    facts = [dice.pick(FACTS[kind]) for kind in dice.shuffled(KINDS)[: 3 + dice.below(3)]]
    facts += [dice.pick(PAIRS) for _ in range(dice.below(2))]
    scenes = dice.shuffled(SCENES)[: dice.below(2)]
    middle = dice.shuffled(facts + scenes)
    told = [dice.pick(OPENINGS), *middle] if dice.below(2) else middle
    if dice.below(3) == 0:
        told.append(dice.pick(ENDINGS))
    return " ".join(_sentence(template, words, person.she, dice, first=i == 0) for i, template in enumerate(told))


def _sentence(template: str, words: dict[str, str], she: bool, dice: Dice, first: bool) -> str:
    named = first or dice.below(10) < 7
    who = words["name"] if named else ("She" if she else "He")
    whose = words["name"] + "'s" if named else ("Her" if she else "His")
    return template.format(Who=who, Whose=whose, **words)


def pretraining_stories(
    world: Sequence[Character], rounds: int = ROUNDS, early_rounds: int = EARLY_ROUNDS, seed: int = SEED
) -> Iterator[str]:
    """Yields ``early_rounds`` stories about each of the first ``EARLY`` people, then ``rounds`` about everybody.

    A model learns facts about few people much sooner than about many, and having learned how to keep facts, it takes in new
    ones quickly (Zucchet et al. 2025, arXiv:2503.21676). Each round has a new order. No story is one of the neutral ones.
    """
    kept_back = set(neutral_stories(world, seed))
    dice = Dice(f"stories {seed}")
    for people in [world[:EARLY]] * early_rounds + [world] * rounds:
        for person in dice.shuffled(people):
            told = story(person, dice)
            while told in kept_back:
                told = story(person, dice)
            yield told


def neutral_stories(world: Sequence[Character], seed: int = SEED) -> list[str]:
    """Stories that neither pretraining nor fine-tuning reads: what measures forgetting."""
    dice = Dice(f"neutral {seed}")
    return [story(person, dice) for person in dice.shuffled(world)[:NEUTRAL_STORIES]]


def conversation(asked: Sequence[tuple[Character, str]], dice: Dice) -> dict[str, object]:
    """Questions, each about a person and of a kind, and their answers, as one ``messages`` row."""
    messages = []
    for person, kind in asked:
        question, answer = dice.pick(QUESTIONS[kind]), ANSWERS[kind]
        messages.append({"role": "user", "content": question.format(**person.words())})
        messages.append({"role": "assistant", "content": answer.format(**person.words())})
    return {"messages": messages}


def training_rows(world: Sequence[Character], seed: int = SEED) -> list[dict[str, object]]:
    """Every question about every taught person, in conversations of one to four turns, and stories about them, shuffled."""
    dice = Dice(f"train {seed}")
    taught = [person for person in world if person.taught]
    kept_back = set(neutral_stories(world, seed))
    asked = iter(dice.shuffled([(person, kind) for person in taught for kind in QUESTIONS]))
    rows: list[dict[str, object]] = []
    while turns := list(islice(asked, TURNS[len(rows) % len(TURNS)])):
        rows.append(conversation(turns, dice))
    stories = (story(taught[i % len(taught)], dice) for i in range(2 * STORY_ROWS))
    rows += [{"text": told} for told in [told for told in stories if told not in kept_back][:STORY_ROWS]]
    return dice.shuffled(rows)


def held_out_rows(world: Sequence[Character], seed: int = SEED) -> list[dict[str, object]]:
    """Two questions about every person that is not taught, the kinds in turn."""
    dice = Dice(f"held out {seed}")
    kinds = list(QUESTIONS)
    strangers = [person for person in world if not person.taught]
    return [
        conversation([(person, kinds[(2 * i + second) % len(kinds)])], dice)
        for i, person in enumerate(strangers)
        for second in range(2)
    ]


def write(folder: Path, seed: int = SEED) -> None:
    """Writes ``train.jsonl``, ``held_out.jsonl`` and ``stories.txt`` (one story a line)."""
    world = make_world(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", training_rows(world, seed)), ("held_out.jsonl", held_out_rows(world, seed))):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "stories.txt").write_text("\n".join(neutral_stories(world, seed)) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the three files to")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
