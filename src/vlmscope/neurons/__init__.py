"""Multi-modal neurons: which neurons contribute to a word about a picture, and are they what they seem?

The method of Pan et al. (Finding and Editing Multi-Modal Neurons in Pre-Trained Transformers, arXiv
2311.07470): neuron `i` of layer `l` contributes `a · (W[:, i] · U[t])` to token `t` at the position `p` that
predicts it, where `a` is the neuron's activation there (the input of the down projection `W`) and `U[t]`
the token's row of the output embedding. No gradient is taken, and no table of all neurons and all tokens
is ever made.

What `find` gives can be handed on, as `found`, to all that follows: no picture is captioned again.
"""

from vlmscope.neurons.assessment import assess, describe_edit, objects
from vlmscope.neurons.captions import Caption, nouns
from vlmscope.neurons.cards import describe
from vlmscope.neurons.contributions import find, over_image, score, top_tokens
from vlmscope.neurons.edits import check_margin, edit, random_columns
from vlmscope.neurons.hallucination import falsely_named, questions, yes_or_no
from vlmscope.neurons.measures import measure
from vlmscope.neurons.results import Assessed, Described, Found, Perturbed, read
from vlmscope.neurons.turns import QUESTION, is_there
from vlmscope.neurons.weight_edit import WeightEdit, ablated, edited, export, perturbed
from vlmscope.neurons.without import perturb

__all__ = [
    "QUESTION",
    "Assessed",
    "Caption",
    "Described",
    "Found",
    "Perturbed",
    "WeightEdit",
    "ablated",
    "assess",
    "check_margin",
    "describe",
    "describe_edit",
    "edit",
    "edited",
    "export",
    "falsely_named",
    "find",
    "is_there",
    "measure",
    "nouns",
    "objects",
    "over_image",
    "perturb",
    "perturbed",
    "questions",
    "random_columns",
    "read",
    "score",
    "top_tokens",
    "yes_or_no",
]
