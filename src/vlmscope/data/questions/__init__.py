"""Questions from words: a little English, near-synonyms, and other words of the same role."""
