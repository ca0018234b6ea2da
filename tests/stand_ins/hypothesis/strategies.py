"""Those of hypothesis' strategies that the tests use; ends of ranges come up often."""


class Strategy:
    """Draws values by a function of a random number generator."""

    def __init__(self, draw):
        self.draw = draw

    def map(self, change):
        return Strategy(lambda rng: change(self.draw(rng)))

    def __or__(self, other):
        return Strategy(lambda rng: rng.choice((self, other)).draw(rng))


def _between(low, high, usual):
    return Strategy(lambda rng: rng.choice((low, high)) if rng.random() < 0.2 else usual(rng, low, high))


def floats(low, high):
    return _between(low, high, lambda rng, low, high: low + (high - low) * rng.random() ** rng.choice((1, 3)))


def integers(low, high):
    return _between(low, high, lambda rng, low, high: rng.randint(low, high))


def booleans():
    return sampled_from([False, True])


def sampled_from(values):
    return Strategy(lambda rng: rng.choice(values))


def tuples(*strategies):
    return Strategy(lambda rng: tuple(strategy.draw(rng) for strategy in strategies))


def lists(strategy, *, min_size=0, max_size=10):
    return Strategy(lambda rng: [strategy.draw(rng) for _ in range(rng.randint(min_size, max_size))])


def sets(strategy):
    return lists(strategy).map(set)


class Data:
    """Draws within a test."""

    def __init__(self, rng):
        self.rng = rng

    def draw(self, strategy, label=""):
        value = strategy.draw(self.rng)
        print(f"drawn {label}: {value}")
        return value


def data():
    return Strategy(Data)
