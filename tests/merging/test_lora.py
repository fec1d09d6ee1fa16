"""Adapters are averaged as the products that they add to the base."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.lora import Factors, adapter_pairs, average_adapters, average_products, residuals

ROWS, COLUMNS, RANK = 30, 20, 3


def draw(count, seed=0, rows=ROWS, columns=COLUMNS, rank=RANK, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(rows, rank, generator=generator, dtype=dtype),
            torch.randn(rank, columns, generator=generator, dtype=dtype),
        )
        for _ in range(count)
    ]


def product(each):
    return each.left @ each.right


def exact(products, weights):
    total = sum(weights)
    return sum(weight / total * product(each) for weight, each in zip(weights, products, strict=True))


@pytest.mark.parametrize(("rows", "columns", "count"), [(30, 20, 2), (30, 20, 5), (4, 5, 9), (200, 3, 2)])
def test_the_mean_is_the_best_of_its_rank(rows, columns, count):
    """Against the truncated SVD of the whole matrix (Eckart-Young)."""
    products, weights = draw(count, rows=rows, columns=columns), [1.0 + each for each in range(count)]
    found = average_products(products, weights)
    whole = exact(products, weights)
    left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
    best = left[:, :RANK] * sizes[:RANK] @ right[:RANK]
    torch.testing.assert_close(product(found), best)
    assert found.lost == pytest.approx(float((whole - best).norm() / whole.norm()), abs=1e-9)


def test_averaging_the_factors_apart_is_not_the_average():
    """Two clients with the same product in other factors: apart, B and A even cancel."""
    (own,) = draw(1)
    mirrored = Factors(-own.left, -own.right)
    apart = Factors((own.left + mirrored.left) / 2, (own.right + mirrored.right) / 2)
    assert float(product(apart).abs().max()) == 0
    torch.testing.assert_close(product(average_products([own, mirrored], [1.0, 1.0])), product(own))


def test_adapters_that_are_alike_keep_their_factors():
    (own,) = draw(1)
    found = average_products([own] * 4, [1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(found.left, own.left)
    torch.testing.assert_close(found.right, own.right)
    assert found.lost == pytest.approx(0, abs=1e-9)


def test_a_shared_down_projection_stays_and_b_is_averaged():
    """Then the mean of the products is the product of the mean B: nothing is lost."""
    first, *others = draw(4)
    products = [Factors(each.left, first.right) for each in (first, *others)]
    found = average_products(products, [1.0] * 4)
    torch.testing.assert_close(found.right, first.right)
    torch.testing.assert_close(found.left, sum(each.left for each in products) / 4)


def test_adapters_that_add_nothing_yet_stay_trainable():
    """B is zero at the start: were A zero too, no gradient would ever move either."""
    own = [Factors(torch.zeros_like(each.left), each.right) for each in draw(3)]
    found = average_products(own, [1.0] * 3)
    assert not found.left.any()
    torch.testing.assert_close(found.right, sum(each.right for each in own) / 3)


def test_every_pair_of_a_state_dict_is_averaged_and_nothing_else_in_its_own_type():
    nodes = []
    for seed in range(3):
        (first,), (second,) = draw(1, seed, dtype=torch.float32), draw(1, 9 + seed, 8, 7, 2, dtype=torch.float32)
        nodes.append(
            {
                "a.lora_A.default.weight": first.right,
                "a.lora_B.default.weight": first.left,
                "b.lora_A": second.right,
                "b.lora_B": second.left,
                "head.weight": torch.zeros(3),
            }
        )
    found = average_adapters(nodes, [1.0] * 3)
    assert list(found) == ["a.lora_A.default.weight", "a.lora_B.default.weight", "b.lora_A", "b.lora_B"]
    assert all(value.shape == nodes[0][name].shape for name, value in found.items())
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_no_factor_explodes_where_the_others_nearly_cancel():
    """The exact A for the mean B would be a thousand times the clients': training from it diverges."""
    first, second = draw(2)
    nearly = Factors(-first.left + 1e-3 * second.left, -first.right)
    found = average_products([first, nearly], [1.0, 1.0])
    assert float(found.right.norm()) < 2 * float(first.right.norm())
    torch.testing.assert_close(product(found), exact([first, nearly], [1.0, 1.0]))


def test_adapters_without_a_partner_or_that_are_not_linear_are_refused():
    with pytest.raises(ConfigError, match=r"a\.lora_A\.weight.* no partner"):
        adapter_pairs(["a.lora_A.weight", "b.weight"])
    with pytest.raises(ConfigError, match=r"a\.lora_B\.weight.* no partner"):
        adapter_pairs(["a.lora_B.weight"])
    for shape in ((4, 1, 1, 1), (4, 2, 3, 3), (4,)):  # of a grouped convolution, of another kernel, of no matrix
        conv = {"a.lora_A.weight": torch.zeros(2, 3, 3, 3), "a.lora_B.weight": torch.zeros(shape)}
        with pytest.raises(ConfigError, match="no adapter of linear maps"):
            average_adapters([conv], [1.0])
    with pytest.raises(ConfigError, match=r"no adapters, named lora_A and lora_B, among the arrays \['w'\]"):
        average_adapters([{"w": torch.zeros(2)}], [1.0])


def test_adapters_of_convolutions_and_embeddings_are_averaged_as_products_too():
    """A convolution's A has the kernel's shape and B the size one: together a matrix of rank r times the kernel's."""
    nodes = []
    for seed in range(3):
        (conv,), (table,) = draw(1, seed, 5, 4 * 9, 2), draw(1, 9 + seed, 6, 20, 2)
        nodes.append(
            {
                "c.lora_A.weight": conv.right.view(2, 4, 3, 3),
                "c.lora_B.weight": conv.left.view(5, 2, 1, 1),
                "e.lora_embedding_A": table.right,
                "e.lora_embedding_B": table.left,
            }
        )
    found = average_adapters(nodes, [1.0, 2.0, 3.0])
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in nodes[0].items()}
    for down, up in adapter_pairs(found):
        products = [Factors(each[up].flatten(1), each[down].flatten(1)) for each in nodes]
        expected = average_products(products, [1.0, 2.0, 3.0])
        torch.testing.assert_close(found[up].flatten(1) @ found[down].flatten(1), product(expected))
        rest = residuals(nodes, [1.0, 2.0, 3.0], found)[down]
        torch.testing.assert_close(product(expected) + rest, exact(products, [1.0, 2.0, 3.0]))
