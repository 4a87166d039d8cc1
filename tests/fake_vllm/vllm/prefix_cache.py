"""A prefix cache by vLLM's rules: whole blocks of tokens, found by their content, all before them, and the salt of the
first. A block remembers the weights that computed it, which vLLM's does not."""

BLOCK = 4


class PrefixCache:
    def __init__(self):
        self.found = {}

    def compute(self, tokens, salt, weights):
        """(tokens that were found, the weights behind each block of the prompt) of a prefill with these weights."""
        sources, cached, hitting = [], 0, True
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            key = (salt, tuple(tokens[:end]))
            hitting = hitting and key in self.found and end < len(tokens)  # the last token is always computed
            cached += BLOCK if hitting else 0
            sources.append(self.found[key] if hitting else weights)
            self.found.setdefault(key, weights)
        return cached, sources

    def clear(self):
        self.found.clear()
