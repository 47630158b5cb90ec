"""Everything the demo model can name: objects, colours, shapes, places and numbers.

`OBJECTS` maps a singular noun to the emoji that draw it. Clip art for the same noun is found by
file name (see `sprites.py`), so one noun usually has several renditions by several artists.
"""

from __future__ import annotations

OBJECTS: dict[str, str] = {
    # animals
    "cat": "🐈🐱", "dog": "🐕🐶🐩", "horse": "🐎🐴", "cow": "🐄🐮", "pig": "🐖🐷", "sheep": "🐑🐏",
    "goat": "🐐", "lion": "🦁", "tiger": "🐅🐯", "elephant": "🐘", "bear": "🐻", "panda": "🐼",
    "koala": "🐨", "mouse": "🐁🐭", "rabbit": "🐇🐰", "hamster": "🐹", "squirrel": "🐿",
    "hedgehog": "🦔", "bat": "🦇", "monkey": "🐒🐵", "gorilla": "🦍", "fox": "🦊", "wolf": "🐺",
    "raccoon": "🦝", "deer": "🦌", "camel": "🐫🐪", "giraffe": "🦒", "zebra": "🦓",
    "rhinoceros": "🦏", "hippopotamus": "🦛", "kangaroo": "🦘", "sloth": "🦥", "otter": "🦦",
    "skunk": "🦨", "chicken": "🐔🐓", "chick": "🐤🐥", "duck": "🦆", "swan": "🦢", "owl": "🦉",
    "eagle": "🦅", "penguin": "🐧", "parrot": "🦜", "peacock": "🦚", "flamingo": "🦩",
    "turkey": "🦃", "frog": "🐸", "turtle": "🐢", "snake": "🐍", "lizard": "🦎", "crocodile": "🐊",
    "dinosaur": "🦕🦖", "dragon": "🐉🐲", "unicorn": "🦄", "fish": "🐟🐠", "shark": "🦈",
    "dolphin": "🐬", "whale": "🐳🐋", "octopus": "🐙", "crab": "🦀", "lobster": "🦞",
    "shrimp": "🦐", "snail": "🐌", "butterfly": "🦋", "bee": "🐝", "ladybird": "🐞", "ant": "🐜",
    "spider": "🕷", "scorpion": "🦂", "mosquito": "🦟",
    # food
    "apple": "🍎🍏", "banana": "🍌", "orange": "🍊", "lemon": "🍋", "pear": "🍐", "peach": "🍑",
    "cherry": "🍒", "strawberry": "🍓", "pineapple": "🍍", "watermelon": "🍉", "mango": "🥭",
    "coconut": "🥥", "kiwi": "🥝", "tomato": "🍅", "carrot": "🥕", "potato": "🥔",
    "broccoli": "🥦", "cucumber": "🥒", "onion": "🧅", "garlic": "🧄", "avocado": "🥑",
    "aubergine": "🍆", "mushroom": "🍄", "peanut": "🥜", "bread": "🍞", "croissant": "🥐",
    "pretzel": "🥨", "cheese": "🧀", "egg": "🥚", "pizza": "🍕", "hamburger": "🍔",
    "sandwich": "🥪", "pie": "🥧", "cake": "🎂🍰", "cupcake": "🧁", "biscuit": "🍪",
    "doughnut": "🍩", "sweet": "🍬", "lollipop": "🍭", "chocolate": "🍫", "popcorn": "🍿",
    # vehicles
    "car": "🚗🚘", "taxi": "🚕🚖", "bus": "🚌🚍", "lorry": "🚚🚛", "tractor": "🚜",
    "ambulance": "🚑", "bicycle": "🚲", "motorcycle": "🏍", "scooter": "🛵", "train": "🚆🚂",
    "tram": "🚊🚋", "aeroplane": "✈🛩", "helicopter": "🚁", "rocket": "🚀", "sailing boat": "⛵",
    "ship": "🚢🛳", "canoe": "🛶", "parachute": "🪂", "wheelchair": "🦽",
    # places and nature
    "house": "🏠🏡", "church": "⛪", "castle": "🏰🏯", "tent": "⛺", "factory": "🏭",
    "lighthouse": "", "mountain": "🏔⛰", "volcano": "🌋", "tree": "🌳🌲", "palm tree": "🌴",
    "cactus": "🌵", "flower": "🌼🌸", "rose": "🌹", "sunflower": "🌻", "tulip": "🌷",
    "leaf": "🍁🍂🍃", "clover": "🍀☘", "sun": "☀🌞", "moon": "🌙🌛", "cloud": "☁",
    "rainbow": "🌈", "umbrella": "☂🌂⛱", "snowflake": "❄", "snowman": "⛄☃", "flame": "🔥",
    "globe": "🌍🌎🌏", "drop": "💧",
    # things
    "guitar": "🎸", "violin": "🎻", "trumpet": "🎺", "piano": "🎹", "drum": "🥁",
    "saxophone": "🎷", "banjo": "🪕", "microphone": "🎤", "football": "⚽", "basketball": "🏀",
    "tennis racket": "🎾", "volleyball": "🏐", "key": "🔑🗝", "padlock": "🔒🔓", "scissors": "✂",
    "hammer": "🔨", "spanner": "🔧", "screw": "🔩", "axe": "🪓", "knife": "🔪", "spoon": "🥄",
    "cup": "☕🍵", "glass": "🥛🍷🍸", "bottle": "🍾🍼", "chair": "🪑", "bed": "🛏", "bath": "🛁",
    "toilet": "🚽", "door": "🚪", "clock": "🕒⏰🕙", "watch": "⌚", "telephone": "☎📞",
    "computer": "🖥", "laptop": "💻", "printer": "🖨", "camera": "📷📸", "television": "📺",
    "radio": "📻", "light bulb": "💡", "torch": "🔦", "candle": "🕯", "battery": "🔋",
    "plug": "🔌", "magnet": "🧲", "telescope": "🔭", "microscope": "🔬", "satellite": "🛰",
    "book": "📕📖📗📘", "newspaper": "📰🗞", "pencil": "✏", "pen": "🖊🖋", "envelope": "✉📧",
    "paper clip": "📎", "pin": "📌", "folder": "📁📂", "gift": "🎁", "balloon": "🎈",
    "Christmas tree": "🎄", "bell": "🔔", "crown": "👑", "ring": "💍", "gem": "💎",
    "glasses": "👓", "hat": "🎩👒", "cap": "🧢", "shoe": "👞👟", "boot": "👢🥾", "sock": "🧦",
    "shirt": "👕", "dress": "👗", "trousers": "👖", "glove": "🧤", "scarf": "🧣", "bag": "👜👛",
    "backpack": "🎒", "basket": "🧺", "broom": "🧹", "soap": "🧼", "sponge": "🧽",
    "toothbrush": "", "anchor": "⚓", "sword": "⚔🗡", "shield": "🛡", "flag": "🚩",
    "trophy": "🏆", "medal": "🏅🥇", "dice": "🎲", "kite": "🪁", "teddy bear": "🧸", "yo-yo": "🪀",
    "robot": "🤖", "ghost": "👻", "skull": "💀☠", "pumpkin": "🎃", "eye": "👁", "ear": "👂",
    "nose": "👃", "mouth": "👄", "hand": "✋🖐", "foot": "🦶", "bone": "🦴", "tooth": "🦷",
    "brain": "🧠",
}

# British noun -> other words people use for it, accepted in questions ("Is there a truck?").
SYNONYMS: dict[str, tuple[str, ...]] = {
    "lorry": ("truck",), "aeroplane": ("plane", "airplane"), "sailing boat": ("boat", "sailboat"),
    "ladybird": ("ladybug",), "biscuit": ("cookie",), "sweet": ("candy",), "torch": ("flashlight",),
    "doughnut": ("donut",), "spanner": ("wrench",), "aubergine": ("eggplant",),
    "trousers": ("jeans",), "bath": ("bathtub",), "television": ("TV",), "telephone": ("phone",),
    "football": ("soccer ball",), "hamburger": ("burger",), "bicycle": ("bike",),
    "motorcycle": ("motorbike",), "padlock": ("lock",), "flame": ("fire",), "gift": ("present",),
    "rabbit": ("bunny",), "rhinoceros": ("rhino",), "hippopotamus": ("hippo",),
}

PLURAL_ONLY = frozenset({"scissors", "glasses", "trousers"})
UNCOUNTABLE = frozenset({
    "bread", "broccoli", "garlic", "cheese", "pizza", "chocolate", "popcorn", "soap", "dice",
})
_IRREGULAR = {
    "sheep": "sheep", "deer": "deer", "fish": "fish", "mouse": "mice", "shrimp": "shrimps",
    "wolf": "wolves", "leaf": "leaves", "knife": "knives", "foot": "feet", "tooth": "teeth",
    "cherry": "cherries", "strawberry": "strawberries", "lorry": "lorries", "church": "churches",
    "battery": "batteries", "butterfly": "butterflies", "ladybird": "ladybirds",
    "volcano": "volcanoes", "tomato": "tomatoes", "potato": "potatoes", "factory": "factories",
    "mango": "mangoes", "monkey": "monkeys", "mosquito": "mosquitoes", "peach": "peaches",
    "trophy": "trophies",
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "pentagon")

# Typical RGB of each named colour; scenes jitter around it.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 30, 36), "orange": (250, 135, 20), "yellow": (250, 222, 40),
    "green": (40, 160, 62), "blue": (34, 82, 210), "purple": (128, 44, 168),
    "pink": (250, 140, 188), "brown": (124, 74, 36), "black": (18, 18, 20),
    "white": (250, 250, 250), "grey": (134, 134, 138),
}

NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five")

PLACES: tuple[str, ...] = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)


def article(noun: str) -> str:
    """Return `noun` with its indefinite article ("a cat", "an owl", "some bread", "scissors")."""
    if noun in PLURAL_ONLY:
        return noun
    if noun in UNCOUNTABLE:
        return f"some {noun}" if noun != "dice" else "a dice"
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uni", "eu"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of `noun`."""
    if noun in PLURAL_ONLY or noun in UNCOUNTABLE:
        return noun
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"
