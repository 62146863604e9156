"""Fingerprints for the telephone: 16 bytes <-> hexadecimal digits, and their first 12 bytes <-> 12 words.

A word stands for one byte. Twelve words are 96 bits: whoever wants to pass another key off as this one has to find one
whose fingerprint begins alike, which takes 2^96 tries and not 2^64, a number that money can buy. The hexadecimal form,
which messages and logs show, is whole.

The words are ours: common ones of 4 to 7 letters, no two of which share their first four letters or come within two
letters of each other.
"""

from __future__ import annotations

from difflib import get_close_matches

from ciphertune.errors import KeyFileError

WORDS = tuple(
    """
    acorn admiral agent album almond amber anchor apple apron arctic aspen atlas autumn badge bakery balcony bamboo
    banjo barrel basket beach beaver bicycle biscuit blossom bonfire bottle brick bronze broom buffalo butter cabin
    cactus canyon captain carpet castle cedar celery chapel cherry chimney circus clover cobalt coconut coffee comet
    compass copper cotton cowboy cradle cricket crystal cushion daisy dancer denim desert diamond doctor dolphin
    donkey dragon drum dune eagle earth easel echo elbow emerald engine estate exit eyebrow fabric feather fence
    fiddle finger fishing flute forest fossil fridge furnace galaxy garden garlic giraffe glacier globe goblet gondola
    gorilla granite gravel guitar helmet hickory horse hotel igloo insect island ivory jaguar jelly jewel jigsaw
    journal jungle kayak kernel ketchup kitchen koala ladder lagoon lantern laptop lasso lava lemon lettuce lily linen
    lizard lobster locket lunch magnet magpie mammal marble meadow mermaid mirror mitten mosaic muffin museum mustard
    napkin nectar needle nephew nickel ninja nugget nutmeg oasis oatmeal ocean octopus olive onion opera orange
    orchard oregano osprey oxygen palace panda paper parrot parsley pebble pelican pencil piano pigeon pillow pirate
    planet polar pony potato prairie pretzel pudding pumpkin puzzle pyramid quarry quilt quiver rabbit rainbow rhubarb
    ribbon robot rubber ruby salad school scooter season sheriff silver sketch slipper snail soccer sofa spider spruce
    square squid stadium sugar sunset swan symbol tadpole tailor teapot temple tennis thistle thunder toast tornado
    tractor trout trumpet tulip tundra tunnel turtle tuxedo unicorn urchin vacuum valley vanilla village vinegar
    violin volcano voyage waffle walnut whale wheel window wolf yacht zebra zenith zigzag zinc
    """.split()  # noqa: SIM905 - to be read, not parsed
)

SPOKEN = 12  # bytes of a fingerprint that are said as words


def spoken(fingerprint: bytes) -> str:
    """The words of a fingerprint."""
    return " ".join(WORDS[byte] for byte in fingerprint[:SPOKEN])


def parse(told: str) -> bytes:
    """What somebody read out or pasted: the 16 bytes of 32 hexadecimal digits, or the first 12 from 12 words.

    Digits may be grouped by spaces, colons or hyphens. Raises KeyFileError naming the word that is none.
    """
    parts = told.lower().replace(":", " ").replace("-", " ").replace(",", " ").split()
    digits = "".join(parts)
    if digits and set(digits) <= set("0123456789abcdef"):
        if len(digits) != 32:
            raise KeyFileError(f"a fingerprint has 32 hexadecimal digits, not {len(digits)}")
        return bytes.fromhex(digits)
    for word in parts:
        if word not in WORDS:
            near = get_close_matches(word, WORDS, n=1)
            hint = f"; did they say {near[0]}?" if near else ""
            raise KeyFileError(f"{word[:40]!r} is no word of a fingerprint{hint}")
    if len(parts) != SPOKEN:
        raise KeyFileError(f"a fingerprint has {SPOKEN} words, not {len(parts)}")
    return bytes(WORDS.index(word) for word in parts)


def agree(fingerprint: bytes, told: bytes) -> bool:
    """Whether a fingerprint is the one that was told, as far as it was."""
    return len(told) >= SPOKEN and fingerprint[: len(told)] == told
