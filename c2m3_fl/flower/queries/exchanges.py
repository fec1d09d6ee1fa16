"""The exchanges of a refit from clients: queries with networks, and what can be read of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError, ParamsError
from c2m3_fl.flower.incoming.admitted import fault_of, report_unanswered
from c2m3_fl.flower.incoming.records import Entry, to_params
from c2m3_fl.flower.incoming.replies import only_arrays
from c2m3_fl.flower.queries.networks import Sealed, is_stale, write_networks
from c2m3_fl.flower.queries.refit_options import ClientRefit, RegMean
from c2m3_fl.flower.queries.sums import ACTION
from c2m3_fl.merging.recalibrate.from_clients.packing import expected, expected_channels, unpack
from c2m3_fl.merging.recalibrate.from_clients.plan import Plan, Question
from c2m3_fl.merging.recalibrate.from_clients.sums import Answer
from c2m3_fl.network.program import Program

_NO_HOLDOUT = 5  # where all examples count alike
_CLIENTS, _SEEDS = 100_003, 2**31  # every client draws positions of its own


class Exchanges:
    """Asks clients, and reads what can be read of their answers.

    Parameters
    ----------
    options : ClientRefit or RegMean
        What to ask.
    grid : Grid
        Where the clients are.
    program : Program
        The traced network.
    plan : Plan
        What they are asked in each exchange.
    own : mapping of int to Params
        By node, the network that it runs beside the merged one.
    title : str
        What is refit, for the log; "" for the merged network.

    Attributes
    ----------
    answered : frozenset of int
        The nodes whose answer to the last exchange could be read.
    """

    def __init__(
        self,
        options: ClientRefit | RegMean,
        grid: Grid,
        program: Program,
        plan: Plan,
        own: Mapping[int, Params],
        title: str = "",
    ) -> None:
        self._options, self._grid, self._program, self._plan = options, grid, program, plan
        self._about = f" for {title}" if title else ""
        self.answered: frozenset[int] = frozenset()
        self._nodes = list(own)
        self._own = {node: Sealed.of(params) for node, params in own.items()}
        self._held: dict[int, Sealed] = {}  # the merged network that a client was sent last, if it answered

    def ask(self, exchange: Sequence[Question], params: Params) -> dict[str, dict[int, Answer]]:
        """The usable answers, by operator name and node in the order of the nodes."""
        networks, last = Sealed.of(params), exchange is self._plan.exchanges[-1]
        read: dict[int, dict[str, Answer]] = {}
        failed: dict[int, str] = {}
        asked = self._nodes
        for whole in (False, True):
            lacking: set[int] = set()
            messages = self._messages(exchange, networks, asked, whole=whole, keep=not last)
            for reply in self._grid.send_and_receive(messages, timeout=self._options.timeout):
                node = reply.metadata.src_node_id
                try:
                    if node not in asked or node in read or node in lacking:
                        raise ParamsError("nobody asked it for an answer, or for a second one")
                    if is_stale(reply) and not whole:
                        lacking.add(node)
                    else:
                        read[node] = self._read(reply, exchange, params)
                except Exception as error:  # whatever one client sends is its fault
                    failed[node] = fault_of(node, error).reason
            asked = [node for node in asked if node in lacking]
            if not asked:
                break
        self._held, self.answered = dict.fromkeys(read, networks), frozenset(read)
        found: dict[str, dict[int, Answer]] = {}
        for node in self._nodes:
            for name, answer in read.get(node, {}).items():
                found.setdefault(name, {})[node] = answer
        if not read:
            first = f" (the first reply: {next(iter(failed.values()))})" if failed else ""
            raise CalibrationError(
                f"no client answered the query for sums{first}; every client needs it: add answer_statistics to its app"
            )
        report_unanswered(f"sums{self._about}", failed)
        return found

    def _messages(
        self, exchange: Sequence[Question], merged: Sealed, nodes: Sequence[int], *, whole: bool, keep: bool
    ) -> list[Message]:
        options = self._options
        found = []
        for node in nodes:
            networks, held = {"own": self._own[node]}, {}
            if isinstance(options, ClientRefit):
                networks["merged"] = merged
            if node in self._held and not whole:
                held = {"own": self._own[node], "merged": self._held[node]}
            records, about = write_networks(networks, held, keep=keep)
            config = ConfigRecord(
                {
                    "places": [step.place for step in exchange],
                    "roles": [step.role.value for step in exchange],
                    "sketches": [step.sketch for step in exchange],
                    "positions": options.positions,
                    "holdout": _NO_HOLDOUT if isinstance(options, RegMean) else options.holdout,
                    "seed": (options.seed * _CLIENTS + self._nodes.index(node)) % _SEEDS,
                    "double": int(options.double),
                    **about,
                }
            )
            found.append(Message(RecordDict({**records, "config": config}), node, f"query.{ACTION}"))
        return found

    def _read(self, reply: Message, exchange: Sequence[Question], params: Params) -> dict[str, Answer]:
        """A client's answers by operator name; what cannot be read of it is left out, operator by operator."""
        record = only_arrays(reply)
        node, found = reply.metadata.src_node_id, {}
        for step in exchange:
            operator = self._program.operators[step.place]
            try:
                found[operator.name] = self._read_one(record, step, params)
            except Exception as error:  # as above
                reason = fault_of(node, error).reason
                where = f"{operator.module or operator.name}{self._about}"
                log(WARNING, "\t> no sums of %s from node %d: %s", where, node, reason)
        return found

    def _read_one(self, record: ArrayRecord, step: Question, params: Params) -> Answer:
        operator = self._program.operators[step.place]
        channels = expected_channels(operator, params)
        shapes = expected(self._program, operator, params, step, channels, self._options.double)
        prefix = f"{operator.name}/"
        own = ArrayRecord({name: record[name] for name in record if name.startswith(prefix)})
        schema = {prefix + name: Entry(*entry) for name, entry in shapes.items()}
        tensors = to_params(own, schema, "sums")
        return unpack({name.removeprefix(prefix): value for name, value in tensors.items()}, step.role)
