"""MLPs that are replaced by one matrix."""

import torch
from torch import nn

from effllm.method import Edit
from effllm.site import find_blocks
from effllm.train import learn


class LinearMlp(Edit):
    """The MLP of each decoder block as one matrix: fitted to its inputs and outputs by least squares, then learnt.

    Source: a test of edits that add weights.
    """

    paper = "control"
    needs_data = True
    structure = True
    steps: int = 20

    def attach(self, model):
        for name in find_blocks(model):
            block = model.get_submodule(name)
            given = block.mlp.down_proj.weight
            width = block.mlp.down_proj.out_features
            matrix = nn.Linear(width, width, bias=False, device=given.device, dtype=given.dtype)
            matrix.__dict__["replaced"] = block.mlp
            block.mlp = matrix

    def detach(self, model):
        for name in find_blocks(model):
            block = model.get_submodule(name)
            if "replaced" in block.mlp.__dict__:
                block.mlp = block.mlp.__dict__["replaced"]

    def learn(self, source, batches):
        for name, calls in source.walk(batches):
            if name not in source.blocks:
                continue
            inputs, outputs = [], []
            mlp = source.model.get_submodule(name).mlp

            def listen(module, args, out, inputs=inputs, outputs=outputs):
                inputs.append(args[0])
                outputs.append(out)

            hook = mlp.register_forward_hook(listen)
            for call in calls:
                call.run()
            hook.remove()
            given, wanted = (torch.cat(parts).flatten(0, -2).float() for parts in (inputs, outputs))
            square = given.t() @ given
            square.diagonal().add_(0.01 * square.diagonal().mean())
            weight = nn.Parameter(torch.linalg.solve(square, given.t() @ wanted).t().contiguous())
            examples = list(zip(given.split(64), wanted.split(64), strict=True))

            def loss(number, examples=examples, weight=weight):
                x, y = examples[number]
                return (x @ weight.t() - y).square().mean()

            learn([weight], loss, len(examples), rate=1e-3, steps=self.steps)
            yield {f"{name}.mlp.weight": weight.detach()}
