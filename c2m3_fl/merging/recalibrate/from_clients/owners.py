"""Networks of several widths: an operator is corrected channel by channel, each by the clients that have it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.from_clients.plan import norm_behind
from c2m3_fl.merging.recalibrate.from_clients.sums import FitAnswer
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program


def owner_sets(owned: Tensor) -> list[tuple[list[int], Tensor]]:
    """The channels by who has them; those that nobody has are left out.

    Parameters
    ----------
    owned : Tensor of bool, shape (clients, channels)
        Who has what.

    Returns
    -------
    list of (list of int, Tensor of bool)
        Every set of clients, and a mask of the channels that just these have.
    """
    sets, number = torch.unique(owned.T, dim=0, return_inverse=True)
    return [(torch.nonzero(row)[:, 0].tolist(), number == place) for place, row in enumerate(sets) if bool(row.any())]


def of_inputs(answer: FitAnswer, live: Tensor) -> FitAnswer:
    """Sums as if the other inputs of the operator were zero.

    Parameters
    ----------
    answer : FitAnswer
        The sums.
    live : Tensor of bool, shape (groups, inputs)
        The inputs that count.
    """
    both = live[:, :, None] & live[:, None, :]

    def kept(sums: Sums) -> Sums:
        x, xr = torch.where(live, sums.x, 0.0), torch.where(live[:, :, None], sums.xr, 0.0)
        return replace(sums, x=x, xx=torch.where(both, sums.xx, 0.0), xr=xr)

    further = (None if each is None else kept(each) for each in (answer.sum_train, answer.sum_held_out))
    return FitAnswer(kept(answer.train), kept(answer.held_out), *further)


def take_over(
    program: Program, operator: Operator, params: dict[str, Tensor], corrected: Params, channels: Tensor
) -> None:
    """Take some channels' entries of an operator, and of the BatchNorm behind it, from a corrected network.

    Parameters
    ----------
    program : Program
        The traced network.
    operator : Operator
        The operator that was corrected.
    params : dict of str to Tensor
        The network that takes them; changed in place.
    corrected : mapping of str to Tensor
        The same network, corrected.
    channels : Tensor of bool, shape (channels,)
        Which ones.
    """
    for each in filter(None, (operator, norm_behind(program, operator))):
        for name in filter(None, (each.weight, each.bias, each.mean, each.variance)):
            old = params[name]
            if name == each.weight:
                mask = each.rescaled(torch.ones_like(old), channels.to(old)) != 0
            else:
                mask = channels.reshape(old.shape)
            program.assign(params, name, torch.where(mask, corrected[name], old))
