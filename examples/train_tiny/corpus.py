"""What is said: exchanges with their held-out part, talk that asks nothing, and the voices.

An exchange is a question and its answer. Families that copy something (numbers, names, colours)
or compute something small (sums, opposites, spelling) are products of short lists; part of each
product is held out by a seed, so that an answer to it cannot have been learnt by heart.

    python corpus.py        # counts and a few examples
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from espeak import Voice


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return text.split(", ")


NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
DIGITS = NUMBERS[1:10]
NAMES = _words(
    "anna ben clara david emma frank julia leo lucy martin nina oscar paul rosa simon tom"
)
OBJECTS = _words("ball boat book car coat door flower hat house shirt")
THINGS = _words("cat dog fish planet robot spider")
COLOURS = _words("black blue brown green grey red white yellow")
OPPOSITES = _phrases(
    "hot cold, big small, fast slow, up down, happy sad, open closed, early late, black white, "
    "full empty, wet dry, old young, near far"
)
# Without the letter A, which espeak-ng reads as the article when it stands alone.
SPELLED = _words("dog fish moon six bird tree blue milk nose king river green ship wind gold sun")
FIXED = """
hello = hello there
good morning = good morning to you
good evening = good evening to you
good night = good night and sleep well
how are you = i am fine thank you
what is your name = my name is moshi
who are you = i am a tiny speech model
how old are you = i am very young
can you hear me = yes i can hear you
are you a robot = yes i am a small robot
can you see me = no i can only hear
do you like music = i like music very much
do you ever sleep = no i am always awake
tell me a joke = the chicken crossed the road
what time is it = it is time to talk
thank you = you are welcome
goodbye = goodbye my friend
see you later = see you soon
is it raining = no the sun is shining
what colour is the sky = the sky is blue
what colour is grass = grass is green
what colour is snow = snow is white
where do fish live = fish live in water
what do bees make = bees make honey
what do cows drink = cows drink water
what sound does a dog make = a dog says woof
what sound does a cat make = a cat says meow
how many legs has a spider = a spider has eight legs
how many days are in a week = seven days
how many months are in a year = twelve months
what is the capital of france = the capital of france is paris
what is the capital of italy = the capital of italy is rome
what is the capital of spain = the capital of spain is madrid
what is the capital of japan = the capital of japan is tokyo
what is the largest planet = jupiter is the largest planet
who wrote hamlet = shakespeare wrote hamlet
what is frozen water = frozen water is ice
what do you call a young dog = a young dog is a puppy
count to three = one two three
count to five = one two three four five
"""
STOP = "stop"  # said while the model speaks: it falls silent and answers nothing


@dataclass(frozen=True)
class Exchange:
    family: str
    question: str
    answer: str

    @property
    def spoken(self) -> str:
        """The answer as espeak-ng is to read it: spelled letters by their names."""
        return self.answer.upper() if self.family == "spell" else self.answer


@dataclass(frozen=True)
class Split:
    trained: tuple[Exchange, ...]
    held_out: tuple[Exchange, ...]


def families() -> dict[str, list[Exchange]]:
    made: dict[str, list[tuple[str, str]]] = {
        "fixed": [(q, a) for q, a in (line.split(" = ") for line in FIXED.strip().splitlines())],
        "one": [(f"say {n}", n) for n in NUMBERS],
        "two": [(f"say the numbers {a} {b}", f"{a} {b}") for a, b in product(DIGITS, DIGITS)],
        "sum": [
            (
                f"what is {NUMBERS[a]} plus {NUMBERS[b]}",
                f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}",
            )
            for a, b in product(range(1, 10), range(1, 10))
        ],
        "name": [(f"my name is {n}", f"nice to meet you {n}") for n in NAMES]
        + [(f"say hello to {n}", f"hello {n}") for n in NAMES],
        "colour": [
            (f"my {thing} is {colour}", f"your {thing} is {colour}")
            for thing, colour in product(OBJECTS, COLOURS)
        ],
        "opposite": [
            (f"what is the opposite of {a}", f"the opposite of {a} is {b}")
            for pair in OPPOSITES
            for a, b in (pair.split(), reversed(pair.split()))
        ],
        "spell": [(f"spell {word}", " ".join(word)) for word in SPELLED],
        "pair": [
            (f"say the numbers {a} {b}", f"{a} {b}")
            for a, b in product(NUMBERS, NUMBERS)
            if a not in DIGITS or b not in DIGITS
        ],
        "thing": [
            (f"my {thing} is {colour}", f"your {thing} is {colour}")
            for thing, colour in product(THINGS, COLOURS)
        ],
    }
    return {
        family: [Exchange(family, question, answer) for question, answer in pairs]
        for family, pairs in made.items()
    }


def all_exchanges() -> list[Exchange]:
    return [exchange for group in families().values() for exchange in group]


#: How often an exchange of a large family comes, those of the others coming once.
WEIGHTS = {"pair": 0.3}
HELD_OUT = ("two", "sum", "colour", "pair", "thing")


def split(seed: int = 7, share: float = 0.2) -> Split:
    """Holds out a share of the families that copy, and of the sums those whose mirror stays.

    Every word of a held-out exchange is still heard in others; numbers alone, names, opposites
    and spelling are trained whole, since nothing else teaches their words.
    """
    generator = random.Random(seed)
    trained: list[Exchange] = []
    held_out: list[Exchange] = []
    for family, group in families().items():
        if family not in HELD_OUT:
            trained += group
            continue
        shuffled = generator.sample(group, len(group))
        wanted, kept = int(share * len(group)), set[str]()
        held: list[Exchange] = []
        for exchange in shuffled:
            mirror = exchange.question
            if family == "sum":
                first, _, second = exchange.question.removeprefix("what is ").split()
                mirror = f"what is {second} plus {first}"
                if first == second:
                    kept.add(exchange.question)
            if len(held) < wanted and exchange.question not in kept:
                held.append(exchange)
                kept.add(mirror)
        held_out += held
        trained += [exchange for exchange in group if exchange not in held]
    return Split(tuple(trained), tuple(held_out))


# ---- talk that asks nothing ------------------------------------------------------------------

_ADJECTIVES = _words(
    "bright broken busy careful cheap clever cloudy common curious dark deep different early "
    "empty famous foreign gentle heavy hidden huge hungry large lazy loud lucky narrow nervous "
    "noisy orange patient pleasant proud purple quick quiet rough round sharp silver simple "
    "single smooth soft strange strong sudden sweet thick thin tired usual vast warm weak wide "
    "wild wooden wrong"
)
_NOUNS = _words(
    "answer apple autumn basket bicycle bottle bridge brother bucket butter cabin candle castle "
    "chair cherry child church cloud coffee corner country cousin daughter desert dinner doctor "
    "engine evening farmer father feather field finger forest garden giraffe glass grandmother "
    "guitar hammer harbour hill horse island jacket journey judge kitchen ladder language leather "
    "lesson letter library machine market measure mirror morning mother mountain mouse museum "
    "neighbour newspaper ocean office orchard painter palace pencil photograph picture pilot "
    "pleasure pocket potato prison question rabbit railway road sailor sandwich school season "
    "shadow shoulder silence singer sister soldier stone storm story student sugar summer teacher "
    "theatre thumb thunder ticket tower traffic treasure uncle valley village violin voice weather "
    "wheel window winter witness wizard yard zebra"
)
_VERBS = _words(
    "admired avoided believed borrowed bought broke brought built carried caught chose cleaned "
    "covered crossed described discovered drew enjoyed fetched followed forgot found gathered "
    "guarded heard helped imagined invited joined kept knew left liked lost loved measured met "
    "moved needed noticed offered opened ordered painted passed pulled pushed reached remembered "
    "repaired saw shared showed sold studied taught thought touched understood visited wanted "
    "washed watched wrote"
)
_PLACES = _words(
    "above across after against along among around before behind below beside between beyond by "
    "during from inside near outside over past through towards under with without"
)
_OPENINGS = _phrases(
    "and then, because, but first, however, if, i suppose, it seems, maybe, of course, she said, "
    "they think, though, we all hoped, when, you know"
)
_CLOSINGS = _phrases(
    "again, already, every year, for a while, in january, last thursday, on sunday, once more, "
    "quietly, slowly, together, twice, yesterday, with great joy"
)


class Talk:
    """Sentences nobody needs to answer, 4 to 12 words from lists wide enough for every sound.

    Some nouns and verbs are kept for `unheard`, which makes the sentences of evaluations.
    """

    def __init__(self, seed: int = 11) -> None:
        generator = random.Random(seed)
        nouns, verbs = generator.sample(_NOUNS, len(_NOUNS)), generator.sample(_VERBS, len(_VERBS))
        self._words = {False: (nouns[20:], verbs[12:]), True: (nouns[:20], verbs[:12])}

    def sentence(self, generator: random.Random, *, unheard: bool = False) -> str:
        nouns, verbs = self._words[unheard]
        choose = generator.choice

        def thing() -> str:
            described = f"{choose(_ADJECTIVES)} " if generator.random() < 0.5 else ""
            return (
                f"{choose(('the', 'my', 'this', 'her', 'our', 'his'))} {described}{choose(nouns)}"
            )

        parts = [thing(), choose(verbs), thing()]
        if generator.random() < 0.3:
            parts.insert(0, choose(_OPENINGS))
        if generator.random() < 0.4:
            parts += [choose(_PLACES), thing()]
        elif generator.random() < 0.4:
            parts.append(choose(_CLOSINGS))
        return " ".join(parts)

    def every_word(self) -> list[str]:
        """Texts that together hold all words, for the survey of phonemes."""
        words = _ADJECTIVES + _NOUNS + _VERBS + _PLACES + _OPENINGS + _CLOSINGS
        random.Random(0).shuffle(words)
        return [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]


# ---- voices ----------------------------------------------------------------------------------

MODEL_VOICE = Voice("en-us+f2", rate=145, pitch=50, pitch_range=35)
# "en-gb" with a variant does not resolve: its regions are named instead.
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan")
SEEN_SPEAKERS = _words(
    "m1 m2 m3 m4 m5 m7 m8 f1 f3 f4 Alex Annie Andy Mike Lee steph belinda adam john linda Alicia "
    "edward quincy victor"
)
UNSEEN_SPEAKERS = _words("m6 f5 Michael Diogo")


def user_voice(generator: random.Random, *, unseen: bool = False) -> Voice:
    speaker = generator.choice(UNSEEN_SPEAKERS if unseen else SEEN_SPEAKERS)
    return Voice(
        f"{generator.choice(ACCENTS)}+{speaker}",
        rate=generator.randint(125, 195),
        pitch=generator.randint(25, 75),
        pitch_range=generator.randint(25, 75),
    )


def main() -> None:
    parts, talk, generator = split(), Talk(), random.Random(0)
    for family, group in families().items():
        held = sum(exchange.family == family for exchange in parts.held_out)
        print(f"{family:10} {len(group):4} exchanges, {held:3} held out   {group[-1].question!r}")
    print(f"{len(parts.trained)} trained, {len(parts.held_out)} held out")
    for unheard in (False, True):
        print("talk:", talk.sentence(generator, unheard=unheard))


if __name__ == "__main__":
    main()
