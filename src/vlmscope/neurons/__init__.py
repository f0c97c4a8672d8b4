"""Multi-modal neurons: which neurons turn what a model sees into a word, and whether they are what they seem.

The method of Pan et al. (Finding and Editing Multi-Modal Neurons in Pre-Trained Transformers, arXiv
2311.07470): neuron `i` of layer `l` contributes `a · (W[:, i] · U[t])` to token `t` at the position `p` that
predicts it, where `a` is the neuron's activation there (the input of the down projection `W`) and `U[t]`
the token's row of the output embedding. No gradient is taken, and no table of all neurons and all tokens
is ever made.
"""
