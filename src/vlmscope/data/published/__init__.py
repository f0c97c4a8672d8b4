"""The published sets, made into examples from the layout in which they are distributed: one file each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.errors import DataError, shown

PUBLISHED = ("svo-probes", "mit-states", "faces", "coco-qa", "clevr", "folder")
"""The published sets that `build` makes examples of."""


@dataclass(frozen=True)
class Built:
    """A contrast set, and what was left out on the way.

    `dropped` counts rows, images or folders by the reason in words; `notes` counts examples, by how they
    came by their corrupt prompt or what they lack.
    """

    examples: list[Example]
    dropped: dict[str, int]
    notes: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for a person.

        >>> one = Example("1", "a.png", "red or blue?", "red", "blue", groups={"kind": "color"})
        >>> print(Built([one], {"the image is not there": 2}).summary())
        1 examples
          kind: color 1
        left out:
               2  the image is not there
        """
        lines = [f"{len(self.examples):,} examples"]
        for group in ("kind", "order"):
            values = Counter(one.groups[group] for one in self.examples if group in one.groups)
            if values:
                counts = ", ".join(f"{value} {number:,}" for value, number in sorted(values.items()))
                lines.append(f"  {group}: {counts}")
        lines += [f"  {number:>6,}  {note}" for note, number in self.notes.items()]
        if self.dropped:
            lines.append("left out:")
        lines += [f"  {number:>6,}  {why}" for why, number in self.dropped.items()]
        return "\n".join(lines)


def build(
    name: str,
    root: Path | str,
    *,
    limit: int | None = None,
    seed: int = 0,
    pieces: Callable[[str], int] | None = None,
    download: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Examples of the published set `name`, from the folder `root` in which it was unpacked.

    `limit` is the number of examples in all; by default as many as the balance over groups and orders
    allows, up to the published sizes. `seed` draws them, whatever the order of the files. `pieces` counts
    the tokens of a word, so that corrupt prompts align token for token. `download` first fetches the images
    that are missing (`svo-probes` only); `progress` is then called with how many are done and how many
    there are.

    Raises `DataError` where the folder does not hold that set, or no example is left.

    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> with TemporaryDirectory() as root:
    ...     for label in ("cat", "owl"):
    ...         Path(root, label).mkdir()
    ...         Image.new("RGB", (8, 8)).save(Path(root, label, "1.png"))
    ...     build("folder", root, limit=1).examples[0].clean_prompt
    'is this a cat or an owl?'
    """
    from vlmscope.data.published.sampling import Source
    from vlmscope.data.questions.replacement import replace_words

    if name not in PUBLISHED:
        raise DataError(f"no published data set {shown(name)}; expected one of {', '.join(PUBLISHED)}")
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no examples; expected 1 or more")
    if download and name != "svo-probes":
        raise DataError(f"{name}: has no addresses to download from; only svo-probes has")
    root = Path(root)
    source = Source(name, root, limit, seed)
    if download:
        from vlmscope.data.published.download import fetch

        source.fetch = partial(fetch, log=root / "download-failures.csv", progress=progress)
    module = import_module(f"vlmscope.data.published.{name.replace('-', '_')}")
    try:
        _check_root(name, root)
        found: list[Example] = module.load(source)
    except (OSError, UnicodeEncodeError) as error:
        where, why = getattr(error, "filename", None) or root, getattr(error, "strerror", None) or error
        raise DataError(
            f"{where}: cannot be read ({why}); check permissions and names, or unpack {name} again"
        ) from error
    if not found:
        why = "; ".join(f"{reason} ({number:,})" for reason, number in source.dropped.items())
        raise DataError(
            f"{root}: no example of {name} is left: {why or 'its tables are empty'}; check what lies there, "
            f"or unpack {name} again"
        )
    known: Counter[str] = Counter()
    for n, example in enumerate(found):
        known[example.id] += 1
        if known[example.id] > 1:
            found[n] = replace(example, id=f"{example.id}-{known[example.id]}")
    found, notes = replace_words(found, pieces=pieces, seed=seed)
    if without := sum(example.corrupt_image is None for example in found):
        notes["without a corrupt image: no image pair"] = without
    return Built(found, source.dropped, notes)


def _check_root(name: str, root: Path) -> None:
    """Refuse a folder that cannot hold the data set `name` at all."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; expected the folder that holds {name} as it is distributed")
    if not root.is_dir():
        raise DataError(f"{root}: a file; expected the folder that holds {name}")
    if not any(root.iterdir()):
        raise DataError(f"{root}: an empty folder; unpack {name} there, or give the folder it is in")
