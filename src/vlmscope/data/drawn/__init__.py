"""The sets that the package draws from a seed: `states`, `scenes` and `faces`."""
