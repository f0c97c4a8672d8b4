"""Circuits whose answer is a word of the question, and the truth about edges: by hooks of plain torch."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "planted"))
measures, pictures, plain, planting, scores, truth = map(
    import_module, ("measures", "pictures", "plain", "planting", "scores", "truth")
)
EFFECT = 0.3


@pytest.fixture(scope="module", params="CD")
def made(request):
    return planting.plant(planting.Recipe(request.param, 0, effect=EFFECT, say="options"))


@pytest.fixture(scope="module")
def batch(made):
    return pictures.batch(made.model, pictures.scenes(96, 99))


def test_nothing_in_the_text_tells_the_answer():
    given = pictures.scenes(400, 5)
    first = [given.prompt(n).split()[3] for n in range(len(given))]
    is_answer = [word == list(pictures.COLORS)[given.answer[n]] for n, word in enumerate(first)]
    by_text = pd.Series(is_answer).groupby([given.prompt(n) for n in range(len(given))]).mean()
    assert 0.4 < sum(is_answer) / len(given) < 0.6
    assert by_text.between(0.05, 0.95).mean() > 0.9


def test_the_words_of_the_options_carry_the_share(made, batch):
    runs = plain.Runs(made.model.hf, batch, plain.heads_of(made.model.hf))
    said = made.having("selector", "copier")
    assert runs.share(said) == pytest.approx(EFFECT, rel=0.25)
    assert all(runs.share([part]) > 0.2 * EFFECT for part in said)
    readers, movers = made.having("reader"), made.having("mover")
    assert runs.share(readers) == pytest.approx(EFFECT, rel=0.5)
    assert bool(movers) == (made.recipe.form == "C") and all(runs.share([p]) > 0.2 * EFFECT for p in movers)
    decoys = made.having(*planting.DECOYS)
    assert max(abs(runs.share([part])) for part in decoys) < 0.01


def test_the_copier_says_what_the_neurons_mark(made, batch):
    if made.recipe.form == "D":
        pytest.skip("form D has none")
    hf, [copier] = made.model.hf, made.having("copier")
    where, cuts = None, []
    for part in made.having("matcher"):
        where, cut = plain.columns(hf, part)
        cuts.append(cut.start)

    def silent(x):
        return x.index_fill(-1, torch.tensor(cuts), 0.0)

    whole = plain.Runs(hf, batch, [copier]).patched([copier]).mean()
    with plain.hooked([(where, silent)]):
        without = plain.Runs(hf, batch, [copier]).patched([copier]).mean()
    assert whole > 0.5 and abs(without) < 0.2 * whole


@pytest.mark.slow
def test_the_heads_are_called_by_what_they_do(made):
    [selector], copier = made.having("selector"), made.having("copier")
    labels = measures.labels_of(made, pictures.scenes(20, 11), [selector, *copier])
    assert labels[selector] == "option selector" and all(labels[part] == "mover" for part in copier)


def test_parts_read_what_the_table_of_edges_says(made, batch):
    """The writer's corrupt output, and that alone, in what one head of the last layer reads."""
    if made.recipe.form == "C":
        pytest.skip("in form D all is in one stream")
    table = truth.edges(made)
    readers = made.speaking("selector", "carrier")
    true = table[table["reader"].isin(readers) & table["writer"].str.startswith("decoder.1")]
    assert len(true) == 2 and set(true["reader"]) == set(readers)
    drops = {(w, r): _path(made, batch, w, r) for w in true["writer"] for r in readers}
    edges = set(zip(true["writer"], true["reader"], strict=True))
    assert all(drops[edge] > 0.5 for edge in edges), drops
    assert all(abs(drops[edge]) < 0.1 for edge in set(drops) - edges), drops


def _path(made, given, writer, reader):
    """By how much LD drops when one head of the last layer reads the corrupt run's output of another."""
    hf = made.model.hf
    own, cut = plain.columns(hf, writer)
    _, layer, _, _ = reader.split(".")
    block = hf.model.language_model.layers[int(layer)]
    rows = plain.columns(hf, reader)[1]
    runs = plain.Runs(hf, given, [writer])
    values = [runs.kept[run][id(own)][:, cut] for run in ("corrupt", "clean")]
    change = (values[0] - values[1]) @ own.weight[:, cut].T

    def swap(module, args, out):
        entering = kept["x"].clone()
        entering[:, -1] += change
        new = torch.nn.functional.linear(block.input_layernorm(entering), module.weight)
        out = out.clone()
        out[..., rows] = new[..., rows]
        return out

    kept = {}
    hooks = [block.register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))]
    hooks += [
        one.register_forward_hook(swap)
        for one in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    ]
    with torch.no_grad():
        found = plain.logits(hf, given.clean)
    for hook in hooks:
        hook.remove()
    return float((runs.ld_clean - plain.difference(found, given)).mean())


def test_the_truth_is_written_as_two_tables(made, tmp_path):
    truth.save(made, tmp_path / "truth")
    parts, edges = (pd.read_csv(tmp_path / "truth" / f"{name}.csv") for name in ("parts", "edges"))
    assert dict(zip(parts["part"], parts["role"], strict=True)) == made.roles
    counts = parts.set_index("role")["counts"]
    assert (
        counts["selector"] == "true" and counts["blind"] == "false" and (counts[["carrier"]] == "apart").all()
    )
    assert set(edges["writer"]) | set(edges["reader"]) <= set(parts["part"])
    [selector] = made.having("selector")
    role = "mover" if made.recipe.form == "C" else "reader"
    into = edges[edges["reader"] == selector]
    assert (into["via"] == "query").all() and set(made.having(role)) <= set(into["writer"])
