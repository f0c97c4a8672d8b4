"""Questions from words: a little English, near-synonyms, and other words of the same role."""

ORDERS = ("answer first", "foil first")


def in_order(order: str, answer: str, foil: str) -> tuple[str, str]:
    """The two options as they stand in the prompt.

    >>> in_order("foil first", "red", "blue")
    ('blue', 'red')
    """
    return (answer, foil) if order == ORDERS[0] else (foil, answer)
