"""A block that is left out."""

from effllm.errors import UsageError
from effllm.method import Edit
from effllm.site import find_blocks


class SkipBlock(Edit):
    """The block with a certain number returns what it is given.

    Source: Gromov et al., "The unreasonable ineffectiveness of the deeper layers", arXiv 2403.17887.
    """

    paper = "arXiv 2403.17887"
    block: int = 0

    def attach(self, model):
        blocks = find_blocks(model)
        if self.block >= len(blocks):
            raise UsageError(
                f"skip_block:block={self.block}: the model has {len(blocks)} blocks; give a smaller number"
            )
        module = model.get_submodule(blocks[self.block])
        forward = module.forward

        def skip(hidden_states, *args, **kwargs):
            returned = forward(hidden_states, *args, **kwargs)
            return (hidden_states, *returned[1:]) if isinstance(returned, tuple) else hidden_states

        module.forward = skip

    def detach(self, model):
        for name in find_blocks(model):
            model.get_submodule(name).__dict__.pop("forward", None)
