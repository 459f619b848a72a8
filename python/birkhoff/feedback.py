"""Error feedback: what a weight loses is made up for by the weights after it.

For a layer with inputs x, the error that counts is tr(E H E^T), with E the error of its weights and
H = E[x x^T] the second moments of its inputs. Here H is measured by running the model on synthetic
inputs, and factored into H = C C^T, with which the encoder spreads the errors of the first columns
of a row over the later ones. Only which codes are chosen changes: files and decoding do not.

(Known as GPTQ, Frantar et al., ICLR 2023, and LDLQ, Chee et al., NeurIPS 2023.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from birkhoff.probes import Probe

Layer = nn.Linear | nn.Conv2d

#: Added to the diagonal of the moments, as a share of its mean: inputs that hardly vary on
#: synthetic pictures may do so on others.
DAMPING = 0.03
#: Bytes of moments that are held at once. For a model with more, it is run several times.
MEMORY = 4 << 30


class Feedback:
    """The moments of the inputs of a model's layers, measured where they are asked for.

    Layers are ``nn.Linear`` and ``nn.Conv2d`` without groups, of which all inputs of a window are
    one x.
    """

    def __init__(self, model: nn.Module, probe: Probe, names: Sequence[str]) -> None:
        """Prepares, without running the model.

        Args:
            model: A model on the CPU in eval mode; it must keep its weights.
            probe: Runs the model.
            names: Names of tensors of its state dict, in the order in which they will be asked for;
                those that are not the weights of layers have no feedback.
        """
        self._model = model
        self._probe = probe
        holders: dict[int, list[Layer]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and _is_plain(module):
                holders[module.weight.data_ptr()].append(module)
        tensors = model.state_dict()
        #: The layers of each weight, several if they share it.
        self._layers = {
            name: holders[tensors[name].data_ptr()]
            for name in names
            if name in tensors and tensors[name].data_ptr() in holders
        }
        self._moments: dict[str, Tensor] = {}

    def factor(self, name: str, cols: int) -> NDArray[np.float32] | None:
        """The factor C of the moments for a weight, as the encoder takes it.

        Args:
            name: The name of the weight.
            cols: Columns of the matrix that it is encoded as.

        Returns:
            The upper triangular C of shape (cols, cols); None if the weight is of no layer, the
            layer was not run, or had other inputs than these columns.
        """
        layers = self._layers.get(name)
        if layers is None or layers[0].weight[0].numel() != cols:
            return None
        if name not in self._moments:
            self._measure(name)
        return _factor(self._moments.pop(name))

    @torch.no_grad()
    def _measure(self, first: str) -> None:
        """Runs the model for the layers from one on, as many as memory allows."""
        self._moments = {}
        nbytes = 0
        handles = []
        names = list(self._layers)
        for name in names[names.index(first) :]:
            layers = self._layers[name]
            inputs = layers[0].weight[0].numel()
            nbytes += 4 * inputs**2
            if self._moments and nbytes > MEMORY:
                break
            moments = torch.zeros(inputs, inputs)
            self._moments[name] = moments
            handles += [layer.register_forward_pre_hook(_Accumulate(moments)) for layer in layers]
        try:
            self._probe(self._model)
        finally:
            for handle in handles:
                handle.remove()


class _Accumulate:
    """A hook that adds the second moments of a layer's inputs."""

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float()
        if isinstance(layer, nn.Conv2d):
            rows = nn.functional.unfold(
                rows,
                layer.kernel_size,
                layer.dilation,
                layer.padding,  # type: ignore[arg-type]  # no word, as layers were chosen
                layer.stride,
            ).transpose(1, 2)
        rows = rows.reshape(-1, len(self.moments))
        self.moments.addmm_(rows.T, rows)


def _is_plain(layer: Layer) -> bool:
    """Whether a convolution is of all channels, with zeros around them."""
    if isinstance(layer, nn.Linear):
        return True
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return layer.groups == 1 and zeros


def _factor(moments: Tensor) -> NDArray[np.float32] | None:
    """The upper triangular C with C C^T the damped moments; None if there were no inputs."""
    damping = DAMPING * float(moments.diagonal().mean())
    if not 0 < damping < float("inf"):
        return None
    damped = moments.double()
    damped.diagonal().add_(damping)
    # The usual factor is lower triangular: that of the columns in reverse order.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    factor: NDArray[np.float32] = lower.flip(0, 1).float().contiguous().numpy()
    return factor
