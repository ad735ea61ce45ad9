import numpy as np
import torch

from casc.model import noise

SEEDS = torch.tensor([0, 1, 2, 12345, 2**31 - 1, 2**32 - 1])


def mix(x: int) -> int:
    """The hash in unbounded Python integers."""
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)


def test_numbers_are_the_documented_hash():
    for seed in SEEDS.tolist():
        made = noise.uniform(torch.tensor([seed]), noise.RPN, 50)[0].tolist()
        stream = mix(mix(seed) ^ (noise.RPN * 0x9E3779B1) % 2**32)
        assert made == [(mix(stream ^ mix(i)) >> 8) / 2**24 for i in range(50)]


def test_compiled_numbers_are_the_same_to_the_last_bit(compiled):
    def drawn(seed):
        return noise.uniform(seed, noise.STAGE + 2, 1000)

    eager, fast = drawn(SEEDS), compiled(drawn)(SEEDS)
    assert eager.dtype == torch.float32
    assert torch.equal(eager, fast)


def test_an_images_numbers_do_not_depend_on_its_batch():
    together = noise.uniform(SEEDS, noise.RPN, 333)
    assert torch.equal(noise.uniform(SEEDS[2:4], noise.RPN, 333), together[2:4])
    assert torch.equal(noise.uniform(SEEDS, noise.RPN, 100), together[:, :100])


def test_numbers_are_uniform():
    count = 1_000_000
    for values in noise.uniform(SEEDS, noise.RPN, count).double().numpy():
        assert values.min() >= 0
        assert values.max() < 1
        for power in (1, 2, 3, 4):
            # The k-th moment is 1 / (k + 1); five standard errors.
            spread = np.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / count)
            assert abs((values**power).mean() - 1 / (power + 1)) < 5 * spread
        # Kolmogorov: 1.95 / sqrt(n) is the 0.1 % level.
        distance = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.95 / np.sqrt(count)


def test_first_numbers_over_many_seeds_are_uniform():
    # Flips read one number per image: neighbouring seeds must not look alike.
    values = noise.uniform(torch.arange(200_000), noise.FLIP, 1)[:, 0].double().numpy()
    distance = np.abs(np.sort(values) - (np.arange(200_000) + 0.5) / 200_000).max()
    assert distance < 1.95 / np.sqrt(200_000)
    flips = values < 0.5
    assert abs(np.mean(flips[1:] == flips[:-1]) - 0.5) < 5 * 0.5 / np.sqrt(200_000)


def test_purposes_seeds_and_neighbours_are_independent():
    count = 200_000
    streams = [
        noise.uniform(torch.tensor([seed]), purpose, count)[0]
        for seed in (3, 4, 5)
        for purpose in (noise.FLIP, noise.RPN, noise.STAGE, noise.STAGE + 1, noise.STAGE + 2)
    ]
    streams += [streams[0].roll(shift) for shift in (1, 2, 64)]
    correlation = np.corrcoef(torch.stack(streams).double().numpy())
    off = correlation[~np.eye(len(streams), dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(count)
    # Beyond correlation: the pairs fill the unit square evenly.
    for other in streams[1:]:
        pairs = np.histogram2d(streams[0].numpy(), other.numpy(), bins=16, range=[[0, 1]] * 2)[0]
        chi2 = ((pairs - count / 256) ** 2 / (count / 256)).sum()
        assert chi2 < 255 + 5 * np.sqrt(2 * 255)


def test_purposes_are_distinct():
    named = [value for name, value in vars(noise).items() if name.isupper() and name[0] != "_"]
    assert {noise.FLIP, noise.COLOUR, noise.ERASE, noise.DROP_PATH} < set(named)
    made = [
        noise.uniform(torch.tensor([9]), p, 20)[0]
        for p in (*named, *(noise.STAGE + k for k in range(1, 8)))
    ]
    assert len({tuple(values.tolist()) for values in made}) == len(made)
