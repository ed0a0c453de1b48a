"""The demo's facts: keys, values, and the sentences that state them and ask for them."""

from collections.abc import Sequence

KEYS = tuple(
    """
    anchor apricot autumn badger bakery bamboo banjo barrel basket beacon beaver berry blanket
    blossom bonnet bottle bramble breeze bucket butter cactus camel candle canoe canyon carpet
    carrot castle cedar cellar cherry chimney cinnamon clover cobalt comet copper coral cottage
    cotton coyote cradle cricket crystal curtain daisy desert dolphin donkey dragon eagle ember
    engine falcon feather fiddle finch forest fossil fountain garden garlic ginger glacier granite
    guitar hammer harbor hazel hedge heron honey hornet island ivory jacket jasmine jungle kettle
    kitten ladder lagoon lantern lemon lizard lobster magnet mango maple marble meadow melon mirror
    monkey mountain mustard nectar needle nettle ocean olive onion orchard otter oyster paddle
    panther parrot peach pebble pepper pigeon pillow planet pocket pony potato prairie pumpkin
    puppet quartz rabbit raven ribbon river rocket saddle salmon
    """.split()
)


def statement(key: str, value: str) -> str:
    """The needle: one sentence that gives one value of a key.

    Args:
        key: str, one of `KEYS`.
        value: str of four digits.

    Returns:
        str that begins with a space, so that it can follow any sentence.
    """
    return f" The magic number for {key} is {value}."


def question(key: str, several: bool) -> str:
    """The end of the prompt, up to the values.

    Args:
        key: str, one of `KEYS`.
        several: bool, True where the text gives more than one value.

    Returns:
        str.
    """
    if several:
        ask = f"What are the magic numbers for {key}?"
        return f"\nQuestion: {ask}\nAnswer: The magic numbers for {key} are"
    ask = f"What is the magic number for {key}?"
    return f"\nQuestion: {ask}\nAnswer: The magic number for {key} is"


def answer(values: Sequence[str]) -> str:
    """The response: every value of the key, in the order of the text.

    Args:
        values: list of str.

    Returns:
        str, for instance " 4821." or " 4821 and 9034."
    """
    *first, last = values
    return f" {', '.join(first)} and {last}." if first else f" {last}."
