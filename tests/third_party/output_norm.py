"""How large what a block adds is."""

from effllm.method import Score


class OutputNorm(Score):
    """The mean norm of what a block adds to its input: more is more important.

    Source: a test of scores.
    """

    paper = "control"
    needs_data = True
    power: float = 1.0

    def score(self, source, batches):
        sums, counts = {}, {}
        for block, given, returned in source.stream(batches):
            norms = (returned - given).float().norm(dim=-1) ** self.power
            sums[block] = sums.get(block, 0.0) + float(norms.sum())
            counts[block] = counts.get(block, 0) + norms.numel()
        return {block: total / counts[block] for block, total in sums.items()}
