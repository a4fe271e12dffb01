"""What methods learn from and what models are measured on: text, images and speech as batches of model inputs."""


def spread(available: int, count: int) -> list[int]:
    """`count` of the numbers below `available`, evenly spaced from 0 on; all of them where they are fewer."""
    count = min(count, available)
    return [index * available // count for index in range(count)]
