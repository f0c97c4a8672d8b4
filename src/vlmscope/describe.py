"""A model as text: what it has, and exactly what it is given for one example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from vlmscope.checkpoint import toys
from vlmscope.data.example import Example
from vlmscope.errors import VlmscopeError
from vlmscope.families import families
from vlmscope.inputs import Inputs, Pair
from vlmscope.layout import Layout, grid, slots
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model

FLOWS = {
    "rows": "many patches in one pass",
    "suffix": "many patches in one pass, each computing only what it can change",
    "plain": "one forward a patch",
}


def supported() -> str:
    """The supported families and the toys that ship, as text."""
    lines = ["families"]
    lines += [
        f"  {f.name:<16}{f.architecture + (f' ({f.variant})' if f.variant else ''):<46}"
        f"{', '.join(f'{t}: {table.flow}' for t, table in f.towers.items())}"
        for f in families()
    ]
    lines += ["", "how a tower is patched, exactly in every case"]
    lines += [f"  {short:<7}{long}" for short, long in FLOWS.items()]
    lines.append("")
    lines += ["toys", *(f"  {name}" for name in toys())]
    return "\n".join(lines)


def model(model: Model) -> str:
    """One model's towers, layers, heads, widths, token layout and example sites, as text."""
    lines = [f"{model.name}: {model.family.name} ({model.family.architecture})", ""]
    lines.append(f"{'tower':<9}{'layers':>7}{'width':>7}{'heads':>7}{'neurons':>9}  kinds")
    for tower, shape in model.shapes.items():
        heads = max(shape.heads.values())
        kinds = ", ".join(
            f"{k}[.h]" if k in shape.heads else f"{k}[.n]" if k == "mlp" else k for k in shape.kinds
        )
        lines.append(f"{tower:<9}{shape.layers:>7}{shape.width:>7}{heads:>7}{shape.neurons:>9}  {kinds}")
    lines += ["", "positions"]
    layouts = model.layouts()
    blank = Inputs({}, layouts)
    for tower, layout in layouts.items():
        lines.append(f"  {tower:<9}0-{len(layout.tokens) - 1}: {_positions(layout)}")
    lines += ["", "patches (exact in every case)"]
    for tower in layouts:
        lines.append(f"  {tower:<9}{FLOWS[model.flow(tower, blank)]}")
    lines += ["", "example sites"]
    for tower, shape in model.shapes.items():
        for kind in shape.kinds:
            lines.append(f"  {tower}.*.{kind}@*")
        for kind in shape.heads:
            lines.append(f"  {tower}.*.{kind}.h*@" + ("all" if tower == "vision" else "last"))
        lines.append(f"  {tower}.{shape.layers - 1}.mlp.n0@last")
    return "\n".join(lines)


def _positions(layout: Layout) -> str:
    """The tokens of a tower, its image in brackets, and the names of positions."""
    image = set(layout.image or layout.cells)
    words: list[str] = []
    for is_image, some in groupby(enumerate(layout.tokens), key=lambda one: one[0] in image):
        tokens = [token for _, token in some]
        words += [f"[{len(tokens)} of the image]"] if is_image else tokens
    shown = words if len(words) <= 40 else [*words[:20], "...", *words[-10:]]
    names = ["all", "last"] + ["image"] * bool(image) + ["text"] * bool(layout.text)
    text = f"{' '.join(shown)}; {', '.join(names)}"
    if layout.roles:
        text += "; roles such as answer, foil, noun"
    rows, columns = grid(layout)
    return text + (f"; image[row,column], {rows} x {columns} patches" if rows else "")


# -- one example ---------------------------------------------------------------------------------


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
    name = _ids_of(model, inputs, tower)
    if name is None:
        raise VlmscopeError(f"{model.name}: the {tower} tower reads no tokens")
    numbers: list[int] = inputs.tensors[name][0].tolist()
    longer = len(layout.tokens) - len(numbers)
    if longer and layout.image:
        at = layout.image[0]
        numbers = numbers[:at] + [numbers[at]] * longer + numbers[at:]
    names, roles = slots(layout), layout.roles
    return [
        Token(
            n,
            number,
            _text(model, number, layout.tokens[n]),
            names[n],
            tuple(role for role, at in roles.items() if n in at),
            layout.cells.get(n),
        )
        for n, number in enumerate(numbers)
    ]


def _ids_of(model: Model, inputs: Inputs, tower: str) -> str | None:
    """The tensor that holds the token ids of a tower."""
    if tower == model.speaker and "decoder_input_ids" in inputs.tensors:
        return "decoder_input_ids"
    return "input_ids" if tower in ("encoder", "decoder") else None


def _text(model: Model, number: int, otherwise: str) -> str:
    """A token as its tokenizer writes it."""
    return _printable(model.token(number) if number >= 0 else otherwise)


def example(model: Model, one: Example) -> str:
    """What a model is given for an example: every token with its position, slot and role, which patch of
    the picture it is, where the answer is scored and as which token, and where noise goes.

    Raises `ExampleError` if the example cannot be run.
    """
    pair = model.prepare(one)
    lines = [f"{model.name}, example {_printable(one.id)}", f"prompt: {_printable(one.clean_prompt)}"]
    for tower in model.shapes:
        layout = pair.clean.layout[tower]
        rows, columns = grid(layout)
        patches = f", {rows} x {columns} patches of the picture" if rows else ""
        many = f"{len(layout.tokens)} position{'s' * (len(layout.tokens) > 1)}"
        lines += ["", f"{tower}: {many}{patches}"]
        if _ids_of(model, pair.clean, tower):
            lines += _rows(model, pair, tower)
    lines += ["", "noise"]
    for at in ("image", "text"):
        for site in corrupt.noisy(model, at):
            (found,) = model.places(site, pair.clean)
            lines.append(f"  on the {at:<7}{site}: {_spans(found.positions)}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """With nothing that would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _rows(model: Model, pair: Pair, tower: str) -> Iterator[str]:
    """A line a token; what shows a row of the picture is one line."""
    clean = tokens(model, pair.clean, tower)
    other = [t.number for t in tokens(model, pair.corrupt, tower)]
    image = set(pair.clean.layout[tower].image or pair.clean.layout[tower].cells)
    wide = max(len(t.text) for t in clean)
    scored = f"scored here: {_scored(model, pair)}"

    def line_of(token: Token) -> object:
        """What is told on one line: tokens of the image, by row of the picture."""
        if token.position not in image:
            return token.position
        return token.number, token.cell and token.cell[0]

    yield f"  {'position':<10}{'token':<{wide + 2}}{'id':>8}  {'slot':<26}role"
    for _, group in groupby(clean, line_of):
        some = list(group)
        first, last = some[0], some[-1]
        at = str(first.position) if first is last else f"{first.position}-{last.position}"
        slot = first.slot if first is last else f"{first.slot} … {last.slot}"
        notes = [*first.roles]
        if other[first.position] != first.number:
            notes.append(f"corrupt: {_text(model, other[first.position], '')}")
        if tower == model.speaker and last.slot == "readout":
            notes.append(scored)
        yield f"  {at:<10}{first.text:<{wide + 2}}{first.number:>8}  {slot:<26}{', '.join(notes)}".rstrip()


def _scored(model: Model, pair: Pair) -> str:
    shown = {"answer": pair.answer, "foil": pair.foil}
    known = [(what, n) for what, n in shown.items() if n is not None]
    return ", ".join(f"{what} {_text(model, n, '')} (id {n})" for what, n in known)


def _spans(positions: tuple[int, ...]) -> str:
    """Positions, with a dash for each run of them.

    >>> _spans((1, 2, 3, 7))
    '1-3, 7'
    """
    parts = []
    for _, group in groupby(enumerate(positions), lambda one: one[1] - one[0]):
        run = [position for _, position in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
