"""Questions that people ask about a scene, and their true answers.

An answer is a short sentence in one fixed style, so that accuracy can be measured by comparing
text. `KINDS` are the kinds that evaluation reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import vocabulary
from scenes import Item, Scene
from vocabulary import article, plural

KINDS = ("name", "colour", "count", "where", "read", "yesno", "relation", "describe")
_ANIMALS = frozenset(list(vocabulary.OBJECTS)[: list(vocabulary.OBJECTS).index("apple")])
_PICTURES = ("picture", "image", "photo")

_NAME = (
    "What is this?",
    "What is this?",
    "What's this?",
    "What is in this picture?",
    "What's in this picture?",
    "What is in the image?",
    "What is in the picture?",
    "What do you see?",
    "What can you see?",
    "What is shown here?",
    "What does the picture show?",
    "What is this a picture of?",
    "Can you tell me what this is?",
    "What's in the image?",
    "What am I looking at?",
    "What is it?",
)
_ONE_NAME = ("What object is this?", "Name the object.", "Which object is this?")
_ANIMAL = ("What animal is this?", "Which animal is this?", "What kind of animal is it?")
_SHAPE = ("What shape is this?", "Which shape is this?", "What shape is it?")
_DESCRIBE = (
    "Describe this picture.",
    "Describe the picture.",
    "Describe the image.",
    "Describe this image.",
    "Can you describe this picture?",
    "Describe what you see.",
    "Please describe the picture.",
    "Tell me about this picture.",
    "Describe this photo.",
    "Give me a description.",
)
_READ = (
    "Read the text.",
    "What does it say?",
    "What does the text say?",
    "What is written here?",
    "Read the word.",
    "What word is this?",
    "What is the text?",
    "Read this.",
    "What's written?",
    "What does the sign say?",
    "What text is in the picture?",
    "Which word is written here?",
    "Can you read the text?",
    "What does this say?",
)
_CHAT = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Good morning.", "Hey"),
        "Hello! Show me a picture and ask me about it.",
    ),
    (
        ("What can you do?", "How can you help me?", "What are you able to do?", "Help"),
        "I can name things in a picture, count them, tell colours and places, "
        "and read short words.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What model are you?"),
        "I am a small FastVLM demo model.",
    ),
    (("Thank you.", "Thanks", "Thanks!", "Thank you!"), "You are welcome."),
    (("Goodbye.", "Bye", "Bye!", "See you."), "Goodbye!"),
    (("How are you?", "How are you today?", "How do you do?"), "I am well, thank you."),
    (
        (
            "What is this?",
            "What do you see?",
            "What colour is it?",
            "Describe this picture.",
            "Read the text.",
            "How many cats are there?",
            "Is there a dog?",
            "Where is the cat?",
        ),
        "I do not see a picture.",
    ),
    (
        (
            "Write a poem.",
            "Tell me a story.",
            "What is the capital of France?",
            "Who won?",
            "What is the weather like?",
            "Write some code.",
            "Tell me a joke.",
            "What is two plus two?",
        ),
        "I can only answer questions about pictures.",
    ),
)


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    kind: str
    question: str
    answer: str


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _noun(item: Item, number: int = 1) -> str:
    """The noun as answers use it: shapes carry their colour."""
    noun = f"{item.colour} {item.name}" if item.is_shape and item.colour else item.name
    return plural(noun) if number > 1 else noun


def _phrase(group: list[Item]) -> str:
    """ "a cat", "three cats", "two red circles"."""
    if len(group) == 1:
        return article(_noun(group[0]))
    return f"{vocabulary.NUMBERS[len(group)]} {_noun(group[0], len(group))}"


def _text_phrase(scene: Scene) -> str:
    return f"the {'number' if scene.text.isdigit() else 'word'} {scene.text}"


def _asked(rng: np.random.Generator, name: str) -> str:
    """The noun, or now and then another word for it."""
    others = vocabulary.SYNONYMS.get(name, ())
    return _pick(rng, others) if others and rng.random() < 0.4 else name


def _colour_word(rng: np.random.Generator) -> str:
    return "color" if rng.random() < 0.4 else "colour"


def what_is_it(scene: Scene) -> str:
    """The answer to "What is this?"."""
    groups = scene.groups()
    if not groups:
        return _sentence(_text_phrase(scene))
    return _sentence(" and ".join(_phrase(group) for group in groups))


def _name(rng: np.random.Generator, scene: Scene) -> Turn:
    options = list(_NAME)
    groups = scene.groups()
    if len(groups) == 1 and len(groups[0]) == 1:
        item = groups[0][0]
        extra = _SHAPE if item.is_shape else _ANIMAL if item.name in _ANIMALS else _ONE_NAME
        if rng.random() < 0.25:
            options = list(extra)
    return Turn("name", _pick(rng, options), what_is_it(scene))


def _colour(rng: np.random.Generator, scene: Scene) -> Turn | None:
    word = _colour_word(rng)
    options: list[tuple[str, str]] = []
    groups = scene.groups()
    for group in groups:
        item = group[0]
        if item.colour is None:
            continue
        name = _asked(rng, item.name)
        if len(group) == 1 and name not in vocabulary.PLURAL_ONLY:
            forms = [
                f"What {word} is the {name}?",
                f"Which {word} is the {name}?",
                f"What is the {word} of the {name}?",
            ]
            if len(groups) == 1:
                forms.append(f"What {word} is it?")
        else:
            forms = [f"What {word} are the {plural(name)}?"]
            if len(groups) == 1:
                forms.append(f"What {word} are they?")
        options += [(_pick(rng, forms), item.colour)] * (3 if item.is_shape else 2)
    ground = scene.background or "mixed"
    forms = [
        f"What {word} is the background?",
        f"Which {word} is the background?",
        f"What is the background {word}?",
    ]
    options.append((_pick(rng, forms), ground))
    if scene.text_colour:
        noun = "number" if scene.text.isdigit() else "word"
        forms = [
            f"What {word} is the text?",
            f"What {word} is the {noun}?",
            f"What {word} is the writing?",
        ]
        options += [(_pick(rng, forms), scene.text_colour)] * 2
    question, colour = options[int(rng.integers(len(options)))]
    return Turn("colour", question, _sentence(colour))


def _count_question(rng: np.random.Generator, nouns: str) -> str:
    place = _pick(rng, ("", "", " in the picture", " in this picture", " here"))
    forms = [
        f"How many {nouns} are there{place}?",
        f"How many {nouns} are there{place}?",
        f"How many {nouns} do you see?",
        f"Count the {nouns}.",
        f"How many {nouns}?",
        f"How many {nouns} can you see?",
    ]
    return _pick(rng, forms)


def _count(rng: np.random.Generator, scene: Scene) -> Turn:
    groups = scene.groups()
    if not groups or rng.random() < 0.1:
        name = _absent(rng, scene)
        return Turn("count", _count_question(rng, plural(_asked(rng, name))), "None.")
    group = groups[int(rng.integers(len(groups)))]
    name = plural(_asked(rng, group[0].name))
    if group[0].is_shape and rng.random() < 0.3:
        name = f"{group[0].colour} {name}"
    if len(groups) == 1 and rng.random() < 0.1:
        name = "things" if not group[0].is_shape else "shapes"
    return Turn("count", _count_question(rng, name), _sentence(vocabulary.NUMBERS[len(group)]))


def _where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    options = []
    for group in scene.groups():
        place = place_of(group[0].x, group[0].y)
        if len(group) == 1 and place is not None:
            options.append((_asked(rng, group[0].name), vocabulary.PLACES[place]))
    if not options:
        return None
    name, place = options[int(rng.integers(len(options)))]
    be, pronoun = ("are", "They are") if name in vocabulary.PLURAL_ONLY else ("is", "It is")
    end = _pick(rng, ("", "", " in the picture"))
    forms = [
        f"Where {be} the {name}{end}?",
        f"Where {be} the {name}?",
        f"In which part of the picture {be} the {name}?",
    ]
    return Turn("where", _pick(rng, forms), f"{pronoun} {place}.")


def _read(rng: np.random.Generator, scene: Scene) -> Turn:
    options = list(_READ)
    if scene.text and scene.text.isdigit() and rng.random() < 0.5:
        options = [
            "What number is this?",
            "Which number is this?",
            "Read the number.",
            "What is the number?",
            "What number is written here?",
        ]
    return Turn("read", _pick(rng, options), scene.text or "There is no text.")


def _absent(rng: np.random.Generator, scene: Scene) -> str:
    """Something that is not in the picture."""
    present = {item.name for item in scene.items}
    pool = list(vocabulary.SHAPES) if rng.random() < 0.25 else list(vocabulary.OBJECTS)
    name = _pick(rng, pool)
    while name in present:
        name = _pick(rng, pool)
    return name


def _yesno(rng: np.random.Generator, scene: Scene) -> Turn:
    yes = bool(rng.random() < 0.5)
    style = rng.random()
    groups = scene.groups()
    group = groups[int(rng.integers(len(groups)))] if groups else None
    answer = "Yes." if yes else "No."
    if style < 0.12:
        return Turn(
            "yesno",
            _pick(
                rng,
                (
                    "Is there any text?",
                    "Is there a word in the picture?",
                    "Is there any writing?",
                    "Can you see any text?",
                ),
            ),
            "Yes." if scene.text else "No.",
        )
    if style < 0.22 and scene.background:
        colour = scene.background if yes else _other_colour(rng, scene.background)
        return Turn("yesno", f"Is the background {colour}?", answer)
    if style < 0.36 and group and group[0].is_shape and len(group) == 1:
        colour = group[0].colour if yes else _other_colour(rng, group[0].colour)
        return Turn("yesno", f"Is the {group[0].name} {colour}?", answer)
    if group is None:
        name, answer = _absent(rng, scene), "No."
    else:
        name = group[0].name if yes else _absent(rng, scene)
    name = _asked(rng, name)
    one = article(name)
    be = "Are there" if name in vocabulary.PLURAL_ONLY else "Is there"
    picture = _pick(rng, _PICTURES)
    forms = [
        f"{be} {one}?",
        f"{be} {one} in the {picture}?",
        f"{be} {one} in this {picture}?",
        f"Do you see {one}?",
        f"Can you see {one}?",
        f"Are there any {plural(name)}?",
    ]
    if len(scene.items) == 1 and name not in vocabulary.PLURAL_ONLY:
        forms += [f"Is this {one}?", f"Is it {one}?"]
    return Turn("yesno", _pick(rng, forms), answer)


def _other_colour(rng: np.random.Generator, colour: str | None) -> str:
    return _pick(rng, [c for c in vocabulary.COLOURS if c != colour])


def _relation(rng: np.random.Generator, scene: Scene) -> Turn | None:
    groups = scene.groups()
    if len(groups) != 2 or len(scene.items) != 2:
        return None
    first, second = scene.items
    options = [
        (f"What is next to the {a.name}?", b)
        for a, b in ((first, second), (second, first))
        if a.name not in vocabulary.PLURAL_ONLY
    ]
    if abs(first.x - second.x) >= abs(first.y - second.y) + 0.08:
        options += [("What is on the left?", first), ("What is on the right?", second)] * 2
    elif abs(first.y - second.y) >= abs(first.x - second.x) + 0.08:
        options += [("What is at the top?", first), ("What is at the bottom?", second)] * 2
    if not options:
        return None
    question, item = options[int(rng.integers(len(options)))]
    return Turn("relation", question, _sentence(article(_noun(item))))


def _describe(rng: np.random.Generator, scene: Scene) -> Turn:
    groups = scene.groups()
    what = " and ".join(_phrase(g) for g in groups) if groups else _text_phrase(scene)
    ground = f"{article(scene.background or 'mixed')} background"
    text = f", with {_text_phrase(scene)}" if scene.text and groups else ""
    return Turn("describe", _pick(rng, _DESCRIBE), _sentence(f"{what} on {ground}{text}"))


_MAKERS = {
    "name": _name,
    "colour": _colour,
    "count": _count,
    "where": _where,
    "read": _read,
    "yesno": _yesno,
    "relation": _relation,
    "describe": _describe,
}


def place_of(x: float, y: float, margin: float = 0.04) -> int | None:
    """Cell of the 3x3 grid, or None within `margin` of a border between cells."""
    cell = 0
    for value in (y, x):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < margin:
            return None
        cell = 3 * cell + min(2, int(value * 3))
    return cell


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Turn | None:
    """A question of this kind about the scene, or None where it makes no sense."""
    return _MAKERS[kind](rng, scene)


def restyle(rng: np.random.Generator, question: str) -> str:
    """Vary a question's letter case and final punctuation as people do."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question


def conversation(
    rng: np.random.Generator, scene: Scene, weights: dict[str, float], most: int = 5
) -> list[Turn]:
    """Two to `most` turns about one scene; every kind is as likely to come first as its weight."""
    kinds = list(weights)
    share = np.array([weights[k] for k in kinds])
    order = rng.choice(len(kinds), size=len(kinds), replace=False, p=share / share.sum())
    turns: list[Turn] = []
    wanted = int(rng.integers(2, most + 1))
    for index in order:
        turn = ask(rng, scene, kinds[index])
        if turn is not None:
            turns.append(Turn(turn.kind, restyle(rng, turn.question), turn.answer))
        if len(turns) == wanted:
            break
    if rng.random() < 0.02:
        turns.append(
            Turn("chat", _pick(rng, ("Thanks!", "Thank you.", "Thanks")), "You are welcome.")
        )
    return turns


def small_talk(rng: np.random.Generator) -> Turn:
    """One turn without any picture."""
    questions, answer = _CHAT[int(rng.integers(len(_CHAT)))]
    return Turn("chat", restyle(rng, _pick(rng, questions)), answer)


def two_pictures(rng: np.random.Generator, first: Scene, second: Scene) -> Turn:
    """A question about one of two pictures."""
    which = bool(rng.random() < 0.5)
    word = "first" if which else "second"
    scene = first if which else second
    picture = _pick(rng, ("picture", "image"))
    if scene.text and rng.random() < 0.3:
        return Turn("pair", f"What does the {word} {picture} say?", scene.text)
    forms = (
        f"What is in the {word} {picture}?",
        f"What does the {word} {picture} show?",
        f"What is the {word} {picture}?",
    )
    return Turn("pair", restyle(rng, _pick(rng, forms)), what_is_it(scene))
