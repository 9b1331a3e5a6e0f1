"""The parts of the sampler: random numbers, rules that change logits, the choice of a token, log-probabilities."""
