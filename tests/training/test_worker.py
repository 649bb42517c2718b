"""Shares and micro-batches of a worker."""

from pipeline.training.worker import Worker


def test_every_worker_runs_equally_many_forwards_a_step():
    def pieces(rank, world, shares, most=None):
        return Worker(rank, world, shares=shares).pieces(16, most)

    assert pieces(0, 1, 1) == [1]
    assert pieces(0, 1, 1, 5) == [4]
    assert pieces(0, 1, 3, 8) == [2, 2, 2]
    assert [pieces(rank, 2, 3) for rank in (0, 1)] == [[1, 1], [2]]
    assert [pieces(rank, 2, 5) for rank in (0, 1)] == [[1, 1, 1], [2, 1]]
    shares = [list(Worker(rank, 3, shares=8).own_shares) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
