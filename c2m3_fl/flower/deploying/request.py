"""What a deployment starts from: a round's aggregate and replies, and the clients that can be asked."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.widths.rounds import RoundWidths


@dataclass(frozen=True)
class Clients:
    """The clients, as they are asked in a round.

    Attributes
    ----------
    grid : Grid
        Where they are.
    round_number : int
        The round.
    config : ConfigRecord, optional
        The user's evaluate_config.
    arrays_key, config_key, weighted_by : str
        Names of the records and of the weight, as the wrapped strategy has them.
    sampled : frozenset of int
        To whom the round sent its messages.
    """

    grid: Grid
    round_number: int
    config: ConfigRecord | None = None
    arrays_key: str = "arrays"
    config_key: str = "config"
    weighted_by: str = "num-examples"
    sampled: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Request:
    """What a deployment starts from.

    Attributes
    ----------
    aggregate : mapping of str to Tensor
        The trajectory, as the wrapped strategy returned it.
    nodes : tuple of int
        Whose replies were aggregated: they are asked, and others that are connected.
    aligned : AlignedReplies, optional
        What was aggregated; None where the trajectory is that of an earlier round.
    plain : mapping of str to Tensor, optional
        The aggregate without alignment, for a guard.
    returned : mapping of str to Tensor, optional
        The model that was returned before: a candidate for the judge, and what an earlier trajectory was made into.
    clients : Clients, optional
        None where there is no grid.
    deploys : bool
        Whether clients are asked for candidates, and to judge them, in this round.
    equally : bool
        Whether the wrapped strategy ignores weights.
    offers : bool
        Whether to ask for a head that nobody asked for: not where clients did not answer before.
    widths : RoundWidths, optional
        Of the replies, where clients may have other widths than the model's.
    """

    aggregate: Params
    nodes: tuple[int, ...]
    aligned: AlignedReplies | None = None
    plain: Params | None = None
    returned: Params | None = None
    clients: Clients | None = None
    deploys: bool = True
    equally: bool = False
    offers: bool = True
    widths: RoundWidths | None = None
