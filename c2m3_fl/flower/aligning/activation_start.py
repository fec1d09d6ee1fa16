"""A second search of a round, from where the units' activations on the server's calibration data match.

Weights of deep networks that were trained apart say little about which units belong together, their activations more.
The second search therefore runs where many units moved: from starts of their own, as a rule in one round alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO

from flwr.supercore import log

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import order_by_weight
from c2m3_fl.flower.metrics import failure
from c2m3_fl.merging.align.base import Nodes
from c2m3_fl.merging.align.methods import ActivationMatching
from c2m3_fl.network.calibration_set import CalibrationSet

# Groups of units from which a network counts as deep. One merge of six clients with starts of their own, REPAIR, mean
# accuracy from activations less that from weights over six federations (`tests.benchmarks.activation_start`): ResNet8,
# 6 groups, +1.0 points; LeNet, 4 groups, +1.3 points.
DEEP = 4


@dataclass(frozen=True, eq=False)
class ActivationStart:
    """Finds the start of the second search.

    Attributes
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    data : CalibrationSet
        With at least one batch.
    """

    spec: PermutationSpec
    data: CalibrationSet

    def __call__(self, params: Sequence[Params], weights: Sequence[float]) -> list[Permutation] | None:
        """One map per network into the basis of one of them; None, and a line in the log, where there is none.

        Parameters
        ----------
        params : sequence of mappings of str to Tensor
            State dicts of the replies.
        weights : sequence of float
            Their averaging weights, positive.
        """
        try:
            share = normalise_weights(weights, len(params))
            order = tuple(order_by_weight(params, share))
            place = next(iter(params[0].values())).device
            nodes = Nodes(self.spec, tuple(params), share, order, order[0], self.data.model, self.data.to(place))
            return ActivationMatching(universe=True).moves(nodes)
        except Exception as error:  # the search from the weights stands
            log(INFO, "\t> %s: the search starts from the weights alone", failure("matching activations", error))
            return None
