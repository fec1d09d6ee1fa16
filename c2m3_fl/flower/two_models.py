"""The trajectory, which clients train, and the deployed model, which is evaluated and returned.

The trajectory is what the wrapped strategy aggregated. The deployed model is the trajectory recalibrated. Training a
recalibrated model feeds back: on digits with two classes a client, fifteen rounds of REPAIR take FedAvg from .794 to
.283 (`c2m3-fl experiment digits`). Only where many units moved is the first average worth replacing for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO, WARNING

import torch
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest, norm, same, to_device
from c2m3_fl.errors import SpecError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.aligning.aligner import MOVED
from c2m3_fl.flower.options import Feedback

PREFIX = "two-models/"
# How many times the largest reply's norm a deployed model may have and still be trained. Digits, seed 11, which no
# table shows, 12 rounds of REPAIR fed back: from own starts the first round, in which it gains most, has 1.06 to 1.98;
# runs that diverge, under label skew, pass 2 and then 30 to 1e6.
GROWTH = 2.0


class TwoModels:
    """Which model clients train next, remembered from round to round.

    Parameters
    ----------
    feedback : {"never", "moved", "always"}
        When the deployed model becomes the trajectory.
    """

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.forget()

    def forget(self) -> None:
        """Start anew: what comes next is a new start."""
        self.trajectory: Params | None = None
        self._deployed: Params | None = None  # what was returned last; after a crash its digest alone is known
        self._digest = ""
        self.pending: tuple[int, ...] = ()
        self.fed: set[int] = set()
        self.stopped = False

    def next_start(self, incoming: Params) -> Params:
        """What clients train next: the trajectory where `incoming` was returned for it, otherwise `incoming`."""
        if self.trajectory is None or not self._was_returned(incoming):
            self.trajectory, self._deployed, self._digest, self.pending = None, None, "", ()
            return incoming
        known = self.trajectory
        return {name: known[name] for name in incoming}

    def _was_returned(self, params: Params) -> bool:
        if self._deployed is None:
            return digest(params) == self._digest
        deployed = to_device(self._deployed, torch.device("cpu"))
        alike = params.keys() == deployed.keys() and all(
            value.dtype == deployed[name].dtype and value.shape == deployed[name].shape
            for name, value in params.items()
        )
        return alike and same(to_device(params, torch.device("cpu")), deployed)

    @property
    def returned(self) -> str:
        """Digest of the model that was returned last; "" for none."""
        if self._deployed is not None and not self._digest:
            self._digest = digest(self._deployed)
        return self._digest

    def follows(self) -> bool:
        """Whether the model that was sent last is a trajectory, and not a new start."""
        return self.trajectory is not None

    def record(
        self, trajectory: Params, deployed: Params, aligned: AlignedReplies, *, pending: bool, finite: bool = True
    ) -> int:
        """Remember both models of a round; 1 where the deployed model is what clients train next.

        Parameters
        ----------
        trajectory, deployed : mapping of str to Tensor
            The aggregate, and the aggregate recalibrated: the same object where nothing was.
        aligned : AlignedReplies
            What was aggregated.
        pending : bool
            Whether clients are still to be asked for the deployment of this trajectory.
        finite : bool
            Whether all recalibrated models of the round are finite.
        """
        if not finite:
            self.stop("a recalibrated model is not finite")
        feeds = deployed is not trajectory and self._feeds(deployed, aligned)
        self.trajectory = deployed if feeds else trajectory
        self._deployed, self._digest = deployed, ""
        self.pending = tuple(aligned.nodes) if pending else ()
        if feeds:
            self.fed |= {node for node, share in zip(aligned.nodes, aligned.shares, strict=True) if share > 0}
            log(INFO, "\t> the deployed model is what clients train next")
        return int(feeds)

    def deploy(self, deployed: Params) -> None:
        """Remember what was returned for a trajectory that stays."""
        self._deployed, self._digest, self.pending = deployed, "", ()

    def _feeds(self, deployed: Params, aligned: AlignedReplies) -> bool:
        if self.feedback == "never" or self.stopped:
            return False
        if self.feedback == "moved":
            pairs = zip(aligned.nodes, aligned.shares, strict=True)
            fresh = sum(share for node, share in pairs if node not in self.fed) / len(aligned.nodes)
            if fresh <= MOVED:
                return False
        found, largest = norm(deployed), max(norm(params) for params in aligned.params)
        if not found <= GROWTH * largest:
            self.stop(f"the deployed model's norm {found:.3g} exceeds the replies' {largest:.3g}")
            return False
        return True

    def stop(self, reason: str) -> None:
        """Let clients train the trajectory alone from now on."""
        if self.feedback != "never" and not self.stopped:
            log(WARNING, "\t> %s: clients do not train it any more", reason)
        self.stopped = True

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as tensors whose names start with ``two-models/``."""
        state = {f"trajectory/{name}": value for name, value in (self.trajectory or {}).items()}
        if self.returned:
            state["returned"] = torch.tensor(list(bytes.fromhex(self.returned)), dtype=torch.uint8)
        state |= {f"fed/{node}": torch.ones((), dtype=torch.uint8) for node in sorted(self.fed)}
        for place, node in enumerate(self.pending):
            state[f"pending/{place}/{node}"] = torch.ones((), dtype=torch.uint8)
        state["stopped"] = torch.tensor(int(self.stopped), dtype=torch.uint8)
        return {PREFIX + name: value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead; `SpecError` for names that `state_dict` does not give."""
        self.forget()
        trajectory: dict[str, Tensor] = {}
        pending: dict[int, int] = {}
        for key, value in state.items():
            kind, _, rest = key.removeprefix(PREFIX).partition("/")
            if kind == "trajectory":
                trajectory[rest] = value
            elif kind == "returned":
                self._digest = bytes(value.tolist()).hex()
            elif kind == "fed":
                self.fed.add(int(rest))
            elif kind == "pending":
                place, _, node = rest.partition("/")
                pending[int(place)] = int(node)
            elif kind == "stopped":
                self.stopped = bool(value)
            else:
                raise SpecError(f"remembered {key!r} is not part of a strategy's state")
        self.trajectory = trajectory or None
        self.pending = tuple(node for _, node in sorted(pending.items()))


def trajectory_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the trajectory's tensors in a state that was remembered."""
    start = f"{PREFIX}trajectory/"
    return [key.removeprefix(start) for key in state if key.startswith(start)]
