"""A client's width: what it answers when it is asked, in both of Flower's dialects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from logging import INFO

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import GetPropertiesIns
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn

from c2m3_fl.flower.legacy_messages import node_of
from c2m3_fl.flower.widths.sizes import Sizes
from c2m3_fl.flower.widths.stage import Resizing

ACTION = "c2m3_width"
_KEY = "c2m3-width"
_TIMEOUT = 60.0  # seconds that clients have to say which width they have
_AT_ONCE = 64  # legacy clients that are asked at the same time


def width_of(model: nn.Module) -> dict[str, str]:
    """What a client answers, a legacy one as its properties: the number of elements of each of its tensors.

    Examples
    --------
    >>> width_of(nn.Linear(3, 2))
    {'c2m3-width': '[6, 2]'}
    """
    return {_KEY: json.dumps([value.numel() for value in model.state_dict().values()])}


def answer_width(app: ClientApp, *, model: Callable[[Context], nn.Module]) -> None:
    """Let a client app say which width its network has, so that it is sent the model at that width from the start.

    Parameters
    ----------
    app : ClientApp
        Gets one more query handler.
    model : callable
        From the context to the client's network.

    Examples
    --------
    >>> app = ClientApp()
    >>> answer_width(app, model=lambda context: Net(context.node_config["width"]))
    """

    @app.query(ACTION)
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({"width": ConfigRecord(dict(width_of(model(context))))}), reply_to=message)


def ask_grid(resizing: Resizing, grid: Grid, nodes: Iterable[int]) -> None:
    """Ask the nodes whose width is not known, once, and remember the answers.

    Parameters
    ----------
    resizing : Resizing
        What is known.
    grid : Grid
        Where the nodes are.
    nodes : iterable of int
        To whom a model is to be sent.
    """
    nodes = list(nodes)
    unknown = resizing.unknown(nodes)
    if not unknown:
        return
    messages = [Message(RecordDict({"config": ConfigRecord()}), node, f"query.{ACTION}") for node in unknown]
    answers: dict[int, object] = {}
    for reply in grid.send_and_receive(messages, timeout=_TIMEOUT):
        if not reply.has_error() and reply.has_content():
            records = list(reply.content.config_records.values())
            answers[reply.metadata.src_node_id] = records[0].get(_KEY) if records else None
    _note(resizing, nodes, unknown, answers)


def ask_proxies(resizing: Resizing, proxies: Sequence[ClientProxy]) -> None:
    """The same in the legacy dialect, from the clients' properties; all are asked at once.

    Parameters
    ----------
    resizing : Resizing
        What is known.
    proxies : sequence of ClientProxy
        To whom a model is to be sent.
    """
    by_node = {node_of(proxy): proxy for proxy in proxies}
    unknown = resizing.unknown(by_node)
    if not unknown:
        return

    def answer(node: int) -> object:
        try:
            return by_node[node].get_properties(GetPropertiesIns({}), _TIMEOUT, None).properties.get(_KEY)
        except Exception:  # a client without properties, or one that cannot be reached
            return None

    with ThreadPoolExecutor(min(len(unknown), _AT_ONCE)) as pool:
        answers = dict(zip(unknown, pool.map(answer, unknown), strict=True))
    _note(resizing, list(by_node), unknown, answers)


def _note(resizing: Resizing, current: Sequence[int], asked: Sequence[int], answers: Mapping[int, object]) -> None:
    known = _by_answer(resizing.sizes)
    found = {node: known[answer] for node in asked if isinstance(answer := answers.get(node), str) and answer in known}
    left = resizing.answered(found, asked, current)
    if left:
        text = "\t> the width of %d of %d nodes is unknown: they are sent the whole model, their replies tell"
        log(INFO, text, len(left), len(asked))


def _by_answer(sizes: Sizes) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, network in enumerate(sizes.networks):
        found.setdefault(width_of(network.held.model)[_KEY], place)
    return found
