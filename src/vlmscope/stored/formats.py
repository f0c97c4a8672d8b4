"""What folders of results hold: manifests and tables of `circuits`, `faithfulness`, `heads`, `tracing`,
`lens`, `neurons`."""

from __future__ import annotations

from vlmscope.stored import Format, Table

_HEAD = "tower:tower layer:grid kind:kind head:grid position:text"
_KEY = "tower layer kind head position"

CIRCUITS = Format(
    "circuits.json",
    {
        "format": "vlmscope-circuits-1",
        "runs": [str],
        "seed": int,
        "level": float,
        "model": (str, None),
        "chance": [
            {
                "tower": str,
                "kind": str,
                "heads": int,
                "runs": int,
                "in_every_run": int,
                "expected": (float, None),
                "p_value": (float, None),
            }
        ],
        "gaps": {str: float},
        "known": {str: {"severity": str, "sentences": [str]}},
        "no_edges?": str,
    },
    {
        "heads.parquet": Table(
            f"run:text data:text corruption:text {_HEAD} n:int mean:float mean_abs:float ci_low:float? "
            "ci_high:float? mean_held_out:float? p_value:share? q_value:share? important_published:bool "
            "important:bool confirmed:bool?",
            "run tower layer kind head",
        ),
        "universal.csv": Table(
            f"{_HEAD} runs:int important_in:int confirmed_in:int? mean:float weakest:float same_sign:bool "
            "universal:bool universal_published:bool",
            _KEY,
        ),
        "overlap.csv": Table(
            "run:text other:text tower:tower kind:kind heads:int important:int important_other:int both:int "
            "expected:float? p_value:share? q_value:share?",
            "run other tower kind",
            may_be_empty=True,
        ),
    },
)

HEADS = Format(
    "heads.json",
    {
        "format": "vlmscope-heads-2",
        "model": str,
        "weights": (str, None),
        "data": str,
        "data_hash": str,
        "sites": [str],
        "corrupt": (str, None),
        "held_out": ({str: int}, None),
        "seed": int,
        "doubt": (str, None),
    },
    {
        "functions.csv": Table(
            f"{_HEAD} site:text label:text measure:text value:float? null:float? q_value:share? "
            "evidence:text n:int gap:float?",
            "site",
        ),
        "measures.csv": Table(
            f"{_HEAD} site:text measure:text value:float? low:float? high:float? null:float? p_value:share? "
            "n:int q_value:share?",
            "site measure",
        ),
        "together.csv": Table("set:text knockout:text heads:text n:int accuracy:share ld:float?"),
        "maps.parquet": Table(
            "example:text site:text row:grid column:grid attention:float difference:float object:bool "
            "rows:grid columns:grid",
            "example site row column",
            may_be_empty=True,
        ),
    },
)

TRACING = Format(
    "tracing.json",
    {
        "format": "vlmscope-tracing-1",
        "model": str,
        "data": str,
        "noise": {"form": str, "at": str, "scale": (float, None), "draws": int},
        "windows": [int],
        "kinds": [str],
        "by": str,
        "seed": int,
        "examples": int,
        "left_out_of_each_repeat": [int],
    },
    {
        "tracing.parquet": Table(
            "tower:tower kind:kind window:grid layer:grid length:int at:text order:float is_role:bool "
            "token:text? n:int repeats:int restored:float? low:float? high:float? spread:float? "
            "restored_ld:float? spread_ld:float?",
            "tower kind window layer length at",
        )
    },
)

STEER = Format(
    "steer.json",
    {
        "format": "vlmscope-steer-1",
        "model": str,
        "weights": str,
        "sets": str,
        "word": str,
        "data": str,
        "others": str,
        "counts": {str: int},
        "gap": float,
        "strengths": [float],
        "keep_norm": bool,
        "at": str,
        "random": int,
        "seed": int,
    },
    {
        "layers.csv": Table(
            "site:text tower:tower layer:grid kind:kind position:text strength:float n:int effect:float "
            "low:float? high:float? null:float null_low:float null_high:float p_value:share? chosen:bool "
            "q_value:share? works:bool",
            "site strength",
        ),
        "measures.csv": Table(
            "strength:float site:text measure:text set:text value:float low:float? high:float? null:float "
            "n:int",
            "strength measure set",
        ),
        "captions.csv": Table(
            "strength:float set:text example:text prompt:text before:text after:text random:text changed:bool"
        ),
    },
)

PROBE = Format(
    "probe.json",
    {
        "format": "vlmscope-probe-1",
        "model": str,
        "weights": str,
        "data": str,
        "label": str,
        "values": {str: int},
        "held_out": (str, None),
        "patch": str,
        "shuffles": int,
        "ridge": float,
        "seed": int,
    },
    {
        "probes.csv": Table(
            "site:text tower:tower layer:grid kind:kind position:text n:int accuracy:share low:share "
            "high:share chance:share shuffled:share shuffled_most:share p_value:share held_out:share? "
            "held_out_low:share? held_out_high:share? effect:float? effect_low:float? effect_high:float?",
            "site",
        )
    },
)

_ENDS = dict.fromkeys(("value", "low", "high"), (float, None))
_CIRCUIT = "fraction f low high without without_low without_high random random_high p_value".split()
GROUP = "f low high more more_low alone".split()
"""Of a circuit with all of a group: its f, what that exceeds the circuit's by, and f of the group alone."""
FAITHFULNESS = Format(
    "summary.json",
    {
        "format": "vlmscope-faithfulness-1",
        "model": str,
        "weights": str,
        "data": str,
        "corrupt": str,
        "outside": str,
        "metric": str,
        "ratio": str,
        "scores": str,
        "signed": bool,
        "parts": int,
        "ranked_on": (int, None),
        "measured": int,
        "held_out": bool,
        "cpr": _ENDS,
        "cmd": _ENDS,
        "gap": _ENDS,
        "gap_of_runs": (float, None),
        "circuit": {
            **dict.fromkeys(_CIRCUIT, (float, None)),
            "kept": int,
            "draws": int,
            "passes": bool,
            "needed": (int, None),
        },
        "kinds": {str: int},
        "groups": [{"group": str, "kinds": {str: int}, **dict.fromkeys(GROUP, (float, None))}],
        "known": {"severity": str, "sentences": [str]},
        "check": ({"rows": int, "largest": float}, None),
        "lines": [str],
        "seed": int,
    },
    {
        "faithfulness.parquet": Table(
            "ranking:text fraction:share kept:int f:float? low:float? high:float? random:float? "
            "random_low:float? random_high:float?",
            "ranking fraction",
        ),
        "circuit.csv": Table(
            "part:text tower:tower layer:grid kind:kind unit:text score:float drop:float? low:float? "
            "high:float?",
            "part",
        ),
    },
)

SELECTION = Format(
    "selection.json",
    {"format": "vlmscope-selection-1"},
    {
        "selection.csv": Table(
            "data:text corruption:text group:text value:text n:int ran:int correct:int accuracy:share? "
            "kept:int dropped_wrong:int dropped_not_following:int dropped_not_run:int",
            "data corruption group value",
        )
    },
    "this notice run is not finished; run the same command again",
)

_PICTURES = {"pictures.csv": Table("example:text file:text", "example", is_optional=True, may_be_empty=True)}
"""Of the files in `pictures/`."""
_INTERVAL = "value:float? low:float? high:float? n:int"
_ABOUT = {"model": str, "weights?": (str, None), "examples?": int, "on?": [str]}

_STATE = "site:text tower:tower layer:grid position:place token:text slot:text"
LENS = Format(
    "lens.json",
    {
        "what": "lens",
        "model": str,
        "weights": (str, None),
        "data": str,
        "examples": int,
        "sites": [str],
        "top": int,
        "words": [str],
        "dtype": str,
    },
    {
        "lens.parquet": Table(
            f"example:text {_STATE} rank:int predicted:text token_id:int logit:number p:number",
            "example site rank",
        ),
        "words.parquet": Table(
            f"example:text word:text what:text {_STATE} token_id:int rank:int logit:number p:number "
            "null_p:number beaten:share? nulls:int",
            "example word site",
            may_be_empty=True,
        ),
        **_PICTURES,
    },
)

EXPLAIN = Format(
    "explain.json",
    {
        "what": "explain",
        "model": str,
        "weights": str,
        "family": str,
        "dtype": str,
        "prompt": str,
        "answer": str,
        "reference": str,
        "direction": str,
        "at": ("features", "pixels"),
        "rounding": float,
        "grid": [int],
        "cells": int,
        "alone": int,
        "patches": int,
        "further": int,
        "edge": str,
        "window": int,
        "region": ([float], None),
        "view": [float],
        "lacking": [str],
    },
    {
        "words.csv": Table(
            "word:int text:text start:int end:int tokens:int logprob:float without:float "
            "spearman_knockout:float? spearman_gradient:float? spearman_attention:float? sinks:share? "
            "left:share region:float? region_knockout:float?",
            "word",
        ),
        "cells.csv": Table(
            "word:int row:grid column:grid rows:int columns:int exact:float knockout:float? "
            "gradient:float? attention:share?",
            "word row column",
            may_be_empty=True,
        ),
        "layers.csv": Table(
            "word:int tower:tower kind:kind layer:grid knockout:float", "word layer", may_be_empty=True
        ),
        "heads.csv": Table(
            "word:int tower:tower kind:kind layer:grid head:grid knockout:float direct:float?",
            "word layer head",
            may_be_empty=True,
        ),
        "neurons.csv": Table("word:int layer:grid neuron:int score:float tokens:text", "word layer neuron"),
        **_PICTURES,
    },
)

NEURONS = {
    "find": Format(
        "neurons.json",
        {
            "what": "find",
            **_ABOUT,
            "family?": str,
            "words": [str],
            "top?": int,
            "variant?": str,
            "gain?": bool,
        },
        {
            "neurons.parquet": Table(
                "example:text word:text token:text token_id:int position:place layer:grid neuron:int "
                "activation:float weight:float score:float rank:int"
            ),
            "captions.csv": Table("example:text prompt:text caption:text"),
            "layers.csv": Table("word:text layer:grid neurons:int score:float share:float?", "word layer"),
            "tokens.csv": Table(
                "layer:grid neuron:int listed:int mean_score:float tokens:text", "layer neuron"
            ),
        },
    ),
    "describe": Format(
        "neurons.json",
        {"what": "describe", **_ABOUT, "words": [str]},
        {
            "cards.csv": Table("layer:grid neuron:int word:text tokens:text weights:text"),
            "maps.parquet": Table("example:text neuron:text row:grid column:grid activation:float mask:bool"),
            "driving.csv": Table("layer:grid neuron:int rank:int example:text peak:float"),
            "measures.csv": Table(
                "word:text method:text measure:text value:float? ci_low:float? ci_high:float? null:float? "
                "null_95:float? p_value:share? n:int q_value:share?",
                is_optional=True,
            ),
            "left_out.csv": Table("word:text measure:text why:text", is_optional=True, may_be_empty=True),
            **_PICTURES,
        },
    ),
    "perturb": Format(
        "neurons.json",
        {"what": "perturb", **_ABOUT, "words": [str]},
        {
            "perturb.csv": Table(
                "word:text k:int how:text round:int set:text drop_log_p:float? drop_p:float? ci_low:float? "
                "ci_high:float? lost:share? n:int"
            )
        },
    ),
    "edit": Format(
        "neurons.json",
        {
            "what": "edit",
            **_ABOUT,
            "from?": str,
            "to?": (str, None),
            "size": float,
            "neurons?": int,
            "is_of?": str,
            "verdict?": str,
            "tried?": str,
        },
        {
            "measures.csv": Table(f"measure:text {_INTERVAL} before:float? random:float?", "measure"),
            "captions.csv": Table(
                "example:text prompt:text before:text after:text has:bool took:bool same:bool"
            ),
            "columns.csv": Table("layer:grid neuron:int length:float change:float", "layer neuron"),
            "objects.csv": Table(
                "measure:text before:float? after:float? random:float?",
                "measure",
                is_optional=True,
                may_be_empty=True,
            ),
            **_PICTURES,
        },
    ),
}
"""What `neurons` wrote, by the `what` of its manifest."""
