"""A model as text: what it has, and exactly what it is given for one example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlmscope.checkpoint import toys
from vlmscope.data.example import Example
from vlmscope.errors import VlmscopeError
from vlmscope.layout import Layout, grid, slots
from vlmscope.models.families import families
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model

FLOWS = {
    "rows": "many patches in one pass",
    "suffix": "many patches in one pass, each computing only what it can change",
    "plain": "one forward a patch",
}
TEXTS = Environment(
    loader=PackageLoader("vlmscope", "texts"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)


def printable(text: str) -> str:
    """With nothing that would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


TEXTS.filters["printable"] = printable


def _text(name: str, **values: object) -> str:
    return TEXTS.get_template(f"{name}.txt").render(values).rstrip()


def supported() -> str:
    """The supported families and the toys that ship, as text."""
    return _text("supported", families=families(), flows=FLOWS, toys=toys())


def model(model: Model) -> str:
    """One model's towers, layers, heads, widths, token layout and example sites, as text."""
    layouts = model.layouts()
    blank = Inputs({}, layouts)
    flows = {tower: FLOWS[model.flow(tower, blank)] for tower in layouts}
    positions = {tower: _positions(layout) for tower, layout in layouts.items()}
    return _text("model", model=model, positions=positions, flows=flows)


def _positions(layout: Layout) -> str:
    """The tokens of a tower, its image in brackets, and the names of positions."""
    image = set(layout.image or layout.cells)
    words: list[str] = []
    for is_image, group in groupby(enumerate(layout.tokens), key=lambda place: place[0] in image):
        tokens = [token for _, token in group]
        words += [f"[{len(tokens)} of the image]"] if is_image else tokens
    shown = words if len(words) <= 40 else [*words[:20], "...", *words[-10:]]
    names = (
        ["all", "last"]
        + ["readout"] * (layout.readout is not None)
        + ["image"] * bool(image)
        + ["text"] * bool(layout.text)
    )
    parts = [f"0-{len(layout.tokens) - 1}: {' '.join(shown)}", ", ".join(names)]
    parts += ["roles such as answer, foil, noun"] * bool(layout.roles)
    rows, columns = grid(layout)
    parts += [f"image[row,column], {rows} x {columns} patches"] * bool(rows)
    return "; ".join(parts)


class Token(NamedTuple):
    """What stands at one position: the token that `input_ids` has there, and what it is called."""

    position: int
    number: int
    text: str
    slot: str
    roles: tuple[str, ...]
    cell: tuple[int, int] | None


def tokens(model: Model, inputs: Inputs, tower: str) -> list[Token]:
    """Every position of a tower that reads tokens, as the model's own `input_ids` fill it.

    Where one token stands for a whole image, each of the image's positions has it. Raises
    `VlmscopeError` for a tower that reads no tokens.

    >>> from PIL import Image
    >>> from vlmscope import load
    >>> model = load("toy-llava")
    >>> inputs = model.inputs(Image.new("RGB", (48, 48), "white"), "what color?")
    >>> [(t.text, t.slot) for t in tokens(model, inputs, "decoder")[-3:]]
    [('?', '5'), ('assistant', '-2'), (':', 'readout')]
    """
    layout = inputs.layout[tower]
    if tower not in ("encoder", "decoder"):
        raise VlmscopeError(f"{model.name}: the {tower} tower reads no tokens")
    own = "decoder_input_ids" if tower == model.speaker else ""
    ids: list[int] = inputs.tensors.get(own, inputs.tensors["input_ids"])[0].tolist()
    longer = len(layout.tokens) - len(ids)
    if longer and layout.image:
        at = layout.image[0]
        ids = ids[:at] + [ids[at]] * longer + ids[at:]
    names, found = slots(layout), []
    for n, number in enumerate(ids):
        text = printable(model.token(number) if number >= 0 else layout.tokens[n])
        roles = tuple(role for role, where in layout.roles.items() if n in where)
        found.append(Token(n, number, text, names[n], roles, layout.cells.get(n)))
    return found


def example(model: Model, example: Example) -> str:
    """What a model is given for an example: every token with its position, slot and role, which patch of
    the picture it is, where the answer is scored and as which token, and where noise goes.

    Raises `ExampleError` if the example cannot be run.
    """
    pair = model.prepare(example)
    towers = {}
    for tower in model.shapes:
        reads = tower in ("encoder", "decoder")
        towers[tower] = pair.clean.layout[tower], list(_rows(model, pair, tower)) if reads else []
    noise: dict[str, list[tuple[str, str]]] = {"image": [], "text": []}
    for at, sites in noise.items():
        for site in corrupt.noisy(model, at):
            (found,) = model.places(site, pair.clean)
            sites.append((str(site), _spans(found.positions)))
    return _text("example", model=model, example=example, towers=towers, noise=noise, grid=grid)


def _rows(model: Model, pair: Pair, tower: str) -> Iterator[tuple[str, str, int, str, str]]:
    """Positions, token, id, slot and notes: a row a token, but one for each row of the picture."""
    clean, other = tokens(model, pair.clean, tower), tokens(model, pair.corrupt, tower)
    image = set(pair.clean.layout[tower].image or pair.clean.layout[tower].cells)
    options = {"answer": pair.answer, "foil": pair.foil}
    scored = ", ".join(
        f"{what} {printable(model.token(n))} (id {n})" for what, n in options.items() if n is not None
    )

    def row_of(token: Token) -> object:
        in_image = token.position in image
        return (token.number, token.cell and token.cell[0]) if in_image else token.position

    for _, group in groupby(clean, row_of):
        first, *rest = group
        last = rest[-1] if rest else first
        notes = [*first.roles]
        if other[first.position].number != first.number:
            notes.append(f"corrupt: {other[first.position].text}")
        if tower == model.speaker and last.slot == "readout":
            notes.append(f"scored here: {scored}")
        slot = f"{first.slot} … {last.slot}" if rest else first.slot
        at = _spans(range(first.position, last.position + 1))
        yield at, first.text, first.number, slot, ", ".join(notes)


def _spans(positions: tuple[int, ...] | range) -> str:
    """Positions, with a dash for each run of them.

    >>> _spans((1, 2, 3, 7))
    '1-3, 7'
    """
    parts = []
    for _, group in groupby(enumerate(positions), lambda place: place[1] - place[0]):
        run = [position for _, position in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
