"""A refit as a server would make it that holds all data: layer by layer, from the rows themselves."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.network.calibration import load_batches


@torch.no_grad()
def refit_on_a_server(model, own, shares, weights, strengths, places=None):
    """Refit a sequential network in float64, in place: every client's network on its own share, weighted least squares.

    `places` says, by client and number of a layer, which of the client's channels each channel of the layer is, or -1;
    None: they are the same. Channels are fitted by the clients that have them, one set of clients after the other.
    A BatchNorm, which must not be behind one of these layers, takes the statistics of its inputs on all shares.
    """
    masks = [held_out(load_batches([share]), 5)[0] for share in shares]
    ours, theirs = ([x.double() for x, *_ in shares] for _ in range(2))
    for index, layer in enumerate(model):
        theirs = [network[index](x) for network, x in zip(own, theirs, strict=True)]
        if isinstance(layer, nn.Linear | nn.Conv2d):
            whole = torch.arange(len(layer.weight))
            here = [whole if places is None else each[index] for each in places or own]
            before = copy.deepcopy(layer)
            for clients, channels in _owners(here):
                part = copy.deepcopy(before)
                part.weight.data, part.bias.data = before.weight[channels], before.bias[channels]
                sides = [[side[each] for each in clients] for side in (ours, masks)]
                goals = [theirs[each].index_select(1, here[each][channels]) for each in clients]
                _solve(part, *sides, goals, [weights[each] for each in clients], strengths)
                layer.weight.data[channels], layer.bias.data[channels] = part.weight.data, part.bias.data
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean, layer.running_var = _statistics([_flat(each) for each in ours], weights)
        ours = [layer(x) for x in ours]
    return model


def _owners(places):
    """Sets of clients, each with the channels that just these have."""
    owned = torch.stack([each >= 0 for each in places])
    for pattern in {tuple(column) for column in owned.T.tolist()}:
        if any(pattern):
            same = owned.T.eq(torch.tensor(pattern)).all(1)
            yield [client for client, has in enumerate(pattern) if has], torch.nonzero(same)[:, 0]


def _statistics(rows, weights):
    """Mean and variance of all rows, every client's share of its weight; the latter unbiased, as BatchNorm has it."""
    counts = [len(each) for each in rows]
    mass = torch.cat([torch.full((n,), w / sum(weights) / n).double() for n, w in zip(counts, weights, strict=True)])
    x, n = torch.cat(rows), sum(counts)
    mean = mass @ x
    return mean, mass @ (x - mean).square() * n / (n - 1)


def _rows_of(layer, inputs):
    """What a layer's weight multiplies, shape (groups, rows, inputs), position by position."""
    if isinstance(layer, nn.Linear):
        return inputs[None]
    patches = functional.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    patches = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return patches.reshape(len(patches), layer.groups, -1).movedim(1, 0)


def _flat(outputs):
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])


def _solve(layer, ours, masks, theirs, weights, strengths):
    x = [_rows_of(layer, each) for each in ours]
    y = [_flat(each) for each in theirs]
    held = [mask.repeat_interleave(len(each) // len(mask)) for mask, each in zip(masks, y, strict=True)]
    mass = torch.cat(
        [torch.full((len(e),), w / sum(weights) / len(e)).double() for w, e in zip(weights, y, strict=True)]
    )
    x, y, held = torch.cat(x, 1), torch.cat(y), torch.cat(held)
    mean = (mass[:, None] * y).sum(0)
    std = (mass[:, None] * (y - mean).square()).sum(0).sqrt()
    weight, groups = layer.weight.data.reshape(len(layer.weight), -1), len(x)
    chunks, targets = weight.chunk(groups), y.chunk(groups, 1)

    def solved(rows, strength):
        found = []
        for part, old, target in zip(x, chunks, targets, strict=True):
            w = mass[rows] / mass[rows].sum()
            a, r = part[rows], (target - part @ old.T)[rows]
            a, r = a - w @ a, r - w @ r
            ridge = strength * (w[:, None] * a.square()).sum(0).mean()
            system = torch.cat([w.sqrt()[:, None] * a, ridge.sqrt() * torch.eye(a.shape[1]).double()])
            right = torch.cat([w.sqrt()[:, None] * r, torch.zeros(a.shape[1], r.shape[1]).double()])
            found.append(old + torch.linalg.lstsq(system, right).solution.T)
        return found

    def error(matrices):
        total = 0.0
        for part, new, target, spread in zip(x, matrices, targets, std.chunk(groups), strict=True):
            train = mass[~held] / mass[~held].sum()
            left = target - part @ new.T
            left = left - train @ left[~held]
            share_of = mass[held] / mass[held].sum()
            total += float(((share_of[:, None] * left[held].square()).sum(0) / spread.square()).sum())
        return total

    errors = {strength: error(solved(~held, strength)) for strength in strengths}
    best = min(errors, key=errors.get)
    everything = torch.ones_like(held)
    new = solved(everything, best) if errors[best] < error(list(chunks)) * (1 - 1e-3) else list(chunks)
    fitted = torch.cat([part @ each.T for part, each in zip(x, new, strict=True)], 1)
    middle = (mass[:, None] * fitted).sum(0)
    scale = std / (mass[:, None] * (fitted - middle).square()).sum(0).sqrt()
    layer.weight.data = (torch.cat(new) * scale[:, None]).reshape(layer.weight.shape)
    layer.bias.data = mean - scale * middle
