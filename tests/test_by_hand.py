"""One patch worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from models import WORDS, blip, example

from vlmscope.patching import engine, reference
from vlmscope.runs import corrupt
from vlmscope.sites import Site


def one_layer_model():
    """Width 4, everything zero but what is set here; the norms have weight one and bias zero.

    Encoder states: a neutral token is n = (√2, −√2, 0, 0), "red" and "blue" are +v, "green" and
    "yellow" are −v, with v = (0, 0, √2, −√2); all of mean 0 and variance 1, so norms leave them.
    The decoder starts with n, attends evenly (queries are zero), and adds the mean of the encoder
    states. The logit of "red" is the third number of the decoder's normed state, that of "[DEC]"
    its first minus its second, all others are 0.
    """
    model = blip(layers=1, heads=1, width=4, vision_layers=1)
    hf = model.hf
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.fill_(1.0 if norm else 0.0)
        words = hf.text_encoder.embeddings.word_embeddings.weight
        words[:] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        for word, sign in {"red": 1, "blue": 1, "green": -1, "yellow": -1}.items():
            words[WORDS.index(word)] = sign * torch.tensor([0.0, 0.0, 1.0, -1.0])
        unembedding = hf.text_decoder.bert.embeddings.word_embeddings.weight
        unembedding[WORDS.index("[DEC]")] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        unembedding[WORDS.index("red")] = torch.tensor([0.0, 0.0, 1.0, 0.0])
        cross = hf.text_decoder.bert.encoder.layer[0].crossattention
        cross.self.value.weight.copy_(torch.eye(4))
        cross.output.dense.weight.copy_(torch.eye(4))
        transform = hf.text_decoder.cls.predictions.transform
        transform.dense.weight.copy_(torch.eye(4))
        transform.transform_act_fn = torch.nn.Identity().eval()
    return model


@pytest.mark.parametrize("one", [engine, reference])
def test_half_of_the_evidence_by_hand(one):
    """Patching one of two words takes the logit difference half of the way.

    Clean "red blue": the mean of the four encoder states is (n + v + v + n)/4 = n/2 + v/2; with the
    decoder's own n this is 3n/2 + v/2 = (t, −t, s, −s), t = 3/√2, s = 1/√2, whose variance is
    (t² + s²)/2 = 5/2. So LD(clean) = s/√(5/2) = 1/√5, LD(corrupt) = −1/√5. With one word restored
    the v cancel: the state is 3n/2, normed n, and LD = 0, halfway.
    """
    model = one_layer_model()
    (pair,) = corrupt.pairs(model, example("red blue"), "text")
    sites = [Site("encoder", 0, "resid", position=str(n), positions=(n,)) for n in (1, 0)]
    patched = one.patch(model, pair, sites)
    ld, p = {}, {}
    for numbers, scores in patched.chunks:
        ld.update(zip(numbers, scores.ld.tolist(), strict=True))
        p.update(zip(numbers, scores.p.tolist(), strict=True))
    assert patched.clean.ld.item() == pytest.approx(1 / math.sqrt(5), abs=1e-9)
    assert patched.corrupt.ld.item() == pytest.approx(-1 / math.sqrt(5), abs=1e-9)
    assert ld[0] == pytest.approx(0.0, abs=1e-9)
    assert ld[1] == pytest.approx(-1 / math.sqrt(5), abs=1e-9)
    # P(red) with logit 0 beside [DEC] with logit 2√2 and the other words with 0
    assert p[0] == pytest.approx(1 / (math.exp(2 * math.sqrt(2)) + len(WORDS) - 1), abs=1e-9)
